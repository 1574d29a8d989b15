"""Measures questions per second of an evaluation, against one unpruned `generate` call per question.

    python run.py task=throughput                                    the demo, MI-Pruner at 16 tokens
    python run.py task=throughput model=llava15_7b dataset=pope keep=64 batch_size=64 limit=2000

The same samples run in batches of ``batch_size`` and of one. Both must give the same answers. The plain loop runs on
`N_PLAIN` samples. The last line printed is the result as JSON.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from experiments import build, results
from experiments.benchmarks.base import Benchmark, Sample
from experiments.cell import run_cell
from experiments.engines import generate_engine
from experiments.evaluate import subset
from experiments.machine import provenance
from experiments.results import Cell
from experiments.tasks import hours
from mipruner.decoding import Decoding
from mipruner.models import Adapter, Prompt, Video
from mipruner.pruners import NoPruner

N_PLAIN = 40


def plain_loop(adapter: Adapter, benchmark: Benchmark, samples: Sequence[Sample], max_new_tokens: int) -> float:
    """Seconds per question of the plain loop."""
    decoding, clock = Decoding(max_new_tokens=max_new_tokens), lambda stage: nullcontext()

    def answer(sample: Sample) -> None:
        images = benchmark.images(sample.image_id)
        prompt = Prompt(sample.text, [Video(images)] if benchmark.is_video else images, sample=sample.id)
        generate_engine(adapter, NoPruner(), 1.0, decoding, prompt)(clock)

    answer(samples[0])  # one-time work does not count
    start = time.perf_counter()
    for sample in samples:
        answer(sample)
    return (time.perf_counter() - start) / len(samples)


def evaluation(config: dict[str, Any], batch_size: int) -> tuple[float, float, dict[str, str]]:
    """Seconds per question of run.py, the share of them that it waited for images, and the answers by sample."""
    with tempfile.TemporaryDirectory() as folder:
        config = config | {"results": folder, "batch_size": batch_size, "n_masks": 0}
        start = time.perf_counter()
        record = run_cell(config)
        seconds = time.perf_counter() - start
        answers = {row["id"]: row["prediction"] for row in Cell(config).rows()}
        return seconds / record["n_samples"], record["waited_for_images"], answers


def measure(config: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    benchmark, adapter = build.benchmark(config), build.model(config)
    samples = subset(benchmark.samples(), config["limit"], config["shard"], config["seed"])
    chosen = samples[:: max(1, len(samples) // N_PLAIN)][:N_PLAIN]
    plain = plain_loop(adapter, benchmark, chosen, config["decoding"]["max_new_tokens"])
    single, waited_single, answers = evaluation(config, 1)
    batched, waited, same = evaluation(config, config["batch_size"])
    table1 = None
    if config["model"]["name"] == "llava15_7b":  # the model of experiment=table1
        answers_of_table1 = next(row.answers for row in hours.rows() if row.experiment == "table1")
        table1 = answers_of_table1 * batched / 3600
    return {
        **provenance(overrides, adapter.device),
        **{group: config[group]["name"] for group in ("model", "dataset", "pruner")},
        "keep": config["keep"],
        "batch_size": config["batch_size"],
        "n_samples": len(samples),
        "n_plain": len(chosen),
        "questions_per_s": {"plain": 1 / plain, "batches_of_1": 1 / single, "batches": 1 / batched},
        "times_plain": {"batches_of_1": plain / single, "batches": plain / batched},
        "loader_threads": config["loader_threads"],
        "waited_for_images": {"batches_of_1": waited_single, "batches": waited},
        "answers_that_differ": sorted(name for name in answers if answers[name] != same[name]),
        "table1_hours": table1,
    }


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    record = measure(build.resolve(config), overrides)
    for way, rate in record["questions_per_s"].items():
        share = record["waited_for_images"].get(way)
        waited = "" if share is None else f"   waited for images {share:.0%} of the time"
        print(f"{way:<14}{rate:9.2f} questions a second{rate / record['questions_per_s']['plain']:9.2f} x{waited}")
    differ = record["answers_that_differ"]
    print(f"{len(differ)} of {record['n_samples']} answers differ between batches of 1 and {record['batch_size']}")
    if config["out"] is not None:
        results.write_record(Path(config["out"]), record)
    print(json.dumps(record))
