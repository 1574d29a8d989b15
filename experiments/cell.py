"""Runs or resumes one cell of a sweep, names its folder, and prints its record."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from experiments import build
from experiments.accept.published import published
from experiments.benchmarks.base import Benchmark, digest, read_samples
from experiments.evaluate import evaluate, subset
from experiments.ranks import ALONE, Ranks
from experiments.results import FULL, NOT_IDENTITY, WARN_ABOVE, Cell, begin
from experiments.tracking import track
from mipruner.errors import InputError
from mipruner.models import Video
from mipruner.processed import pipeline_of

Draw = Callable[[dict[str, Any], list[dict[str, Any]], Benchmark, Path], None]
"""Function of a record, its rows and a file. Draws some samples into the file."""

WARN_WAITED = 0.2
"""Share of waiting time for images above which a warning is printed."""


def differs(overrides: Sequence[str], seed: int = 0) -> str:
    """Overrides for the folder's name, without groups and without what the name already contains.

    ``seed`` is that of the resolved config, which is 0 if nothing is random.
    """
    shown = [f"seed={seed}"] if seed else []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip("+~") in ("model", "dataset", "pruner", "ablation", "experiment", "keep", "seed", *NOT_IDENTITY):
            continue
        if key.split(".")[0] not in NOT_IDENTITY:
            shown.append(f"{key.split('.')[-1]}={value}")
    return ",".join(shown)


def check_swept(params: Mapping[str, Any] | None, overrides: Sequence[str]) -> None:
    """Raise `InputError` if a file of conf defines a sweep, but the command has no ``-m``."""
    given = {override.partition("=")[0].strip("+~") for override in overrides}
    if missing := [key for key in params or {} if key not in given]:
        words = [word for word in overrides if word.startswith(("experiment=", "ablation="))]
        raise InputError(f"{' '.join(words)} sweeps {', '.join(missing)}: start it with run.py -m, one at a time")


def run_cell(
    config: dict[str, Any], overrides: Sequence[str] = (), ranks: Ranks = ALONE, draw: Draw | None = None
) -> dict[str, Any]:
    """Run or resume the cell of a config made by ``overrides``. Returns its record; {} on other ranks than the first.

    ``draw`` writes an image of ``n_masks`` samples into the folder of the finished cell.
    """
    benchmark = build.benchmark(config)
    samples = read_samples(benchmark)
    if (data := digest(benchmark, samples)) is not None:
        config["dataset"]["digest"] = data
    ranks.wait()
    cell = Cell(config, differs(overrides, config["seed"]))
    if cell.is_done and not config["overwrite"] and not cell.record()["failed"]:
        if ranks.rank > 0:
            return {}
        print(f"finished before: {cell.path} (overwrite=true runs it again)")
        record = cell.record()
        if draw is not None and config["n_masks"] and not (cell.path / "masks.png").exists():
            draw_masks(draw, record, cell, benchmark)
        return record
    samples = subset(samples, config["limit"], config["shard"], config["seed"])
    choices = build.pruner(config), build.budget(config), build.decoding(config)  # errors end here
    if "engine" in config:
        if ranks.n > 1:
            raise InputError("engine=server needs one process: set engine.concurrency instead")
        from experiments import remote  # imports openai, which takes half a second

        server = remote.Server(config)
        with cell.alone(), track(config["logger"], cell) as tracker:
            cell.open(config["overwrite"])
            record = remote.evaluate(cell, server, benchmark, samples, begin(overrides))
            record |= tracker.report(record)
            cell.finish(record)
        return record
    pipeline = pipeline_of(build.any_model(config), *choices)
    if benchmark.is_video:
        pipeline.adapter.chat.check_kinds(pipeline.adapter.kinds([Video([Image.new("RGB", (1, 1))])]))
    if ranks.rank > 0:
        return evaluate(cell, pipeline, benchmark, samples, begin(overrides), ranks)
    with cell.alone(), track(config["logger"], cell) as tracker:
        cell.open(config["overwrite"])
        record = evaluate(cell, pipeline, benchmark, samples, begin(overrides), ranks)
        if draw is not None and config["n_masks"]:
            draw_masks(draw, record, cell, benchmark)
        record |= tracker.report(record)
        cell.finish(record)
    return record


def draw_masks(draw: Draw, record: dict[str, Any], cell: Cell, benchmark: Benchmark) -> None:
    """Draw the kept tokens of some samples. An error while drawing ends nothing, except that the disk is full."""
    try:
        draw(record, cell.rows(), benchmark, cell.path / "masks.png")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        print(f"warning: masks.png was not drawn: {error!r}", file=sys.stderr)


def warnings(record: dict[str, Any]) -> list[str]:
    """Warnings about the metrics: failed samples, skipped rows, unusable answers."""
    lines = []
    if failed := record["failed"]:
        lines.append(f"  {len(failed)} samples failed and count as wrong, see failed in record.json")
    if skipped := record.get("skipped"):
        lines.append(f"  {len(skipped)} bad rows were left out, see skipped in record.json")
    if (waited := record.get("waited_for_images") or 0) > WARN_WAITED:
        lines.append(f"  warning: the model waited for images {waited:.0%} of the time: raise loader_threads")
    for kind, count in record.get("unusable", {}).items():
        if count > WARN_ABOVE * record["n_samples"]:
            lines.append(f"  warning: {count} of {record['n_samples']} answers are {kind}: look at samples.jsonl")
    return lines


def show(record: dict[str, Any], path: str) -> str:
    """A record as text for the terminal."""
    cell, tokens, ms = record["cell"], record["tokens"], record["latency_ms"]
    lines = [
        f"{cell['model']}  {cell['dataset']}  {cell['pruner']}  keep={cell['keep']}  ({record['n_samples']} samples)"
    ]
    errors = record["standard_errors"]
    for name, value in record["metrics"].items():
        lines.append(f"  {name:<28}{value:8.2f}" + (f" ± {errors[name]:.2f}" if name in errors else ""))
    if tokens:
        lines.append(
            f"  tokens kept {tokens['kept']:.4g} of {tokens['visual']:.0f}, {tokens['layer_mean']:.1f} a layer"
        )
        stages = "  ".join(f"{stage} {value:.1f}" for stage, value in ms.items())
        lines.append(f"  ms a sample in batches of {record['batch_size']}: {stages}")
    if server := record.get("server"):
        known = {"tokens": server["prompt_tokens"], "ms": server["request_ms"]}
        means = "  ".join(f"{value:.1f} {name}" for name, value in known.items() if value is not None)
        lines.append(f"  {server['model']} at {server['base_url']}, a prompt on average: {means}")
    lines += warnings(record)
    lines += [f"  published, all tokens: {row}" for row in beside_published(record)]
    lines.append(f"  {path}/record.json")
    if os.path.exists(f"{path}/masks.png"):
        lines.append(f"  {path}/masks.png")
    return "\n".join(lines)


def beside_published(record: dict[str, Any]) -> list[str]:
    """Published scores of the same model and dataset with all tokens, for a record with keep=1.0."""
    cell = record["cell"]
    if cell["keep"] != 1.0 or cell["model"].startswith("demo"):
        return []
    rows = published(cell["model"], cell["dataset"])
    return [f"{row['metric']} {row['value']} ({row['source']}, {row['protocol']} rule)" for row in rows]
