"""Measures the cost of methods on this machine: time of each stage, total time, and memory.

    python run.py task=efficiency                          the demo, on this machine
    python run.py experiment=table3                        Table 3: LLaVA-1.5-7B
    python run.py experiment=table3 weights=random         without its weights

Every combination of method, budget and engine answers one prompt `warmup` times. Then all combinations answer it
`repetitions` times in random order, so that drift of clocks and caches affects all equally. Each repetition runs twice:
with a clock around each stage (where the host waits for the device), and with a clock only at both ends.

Engines: `pipeline` is the engine of evaluations, `engine` is `mipruner.engine`, `generate` is transformers' own
`generate` on the pipeline's short prompt. The floor of a combination is the time for reading the language model's
weights once per forward pass plus the FLOPs of vision and prefill, at the copy bandwidth and matrix product speed
measured in the same run.

The last line printed is the result as JSON; it is also written to ``out``.
"""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from experiments import build, results
from experiments.engines import ENGINES, Budget, Run
from experiments.flops import Decoder, stand_in, vision_flops
from experiments.machine import CLOCKS, Memory, measure_limits, provenance, spread
from experiments.tabular import Table
from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.models import FAMILIES, Adapter, Prompt
from mipruner.pipeline import Pipeline
from mipruner.prompt import Media, Visual, identity
from mipruner.pruners import ImagePruner
from mipruner.timing import Stopwatch


@dataclass
class Subject:
    """One combination of method, budget and engine, and its measurements.

    Attributes
    ----------
    run : callable
        Answers the prompt with a clock for its stages. Returns the number of new tokens.
    held_gib : float
        Device memory between two runs in addition to the model, in GiB: static buffers and recorded graphs.
    """

    method: str
    keep: Budget
    engine: str
    run: Run
    n_visual: int
    tokens_per_layer: list[int]
    floor_ms: float
    held_gib: float = 0.0
    n_new: int = 0
    stages: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    total: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)

    def row(self, model_gib: float) -> dict[str, Any]:
        """Result row, with peak and resident memory without the other subjects."""
        return {
            "method": self.method,
            "keep": self.keep,
            "engine": self.engine,
            "visual_tokens": self.n_visual,
            "visual_tokens_layer_mean": round(fmean(self.tokens_per_layer), 1),
            "new_tokens": self.n_new,
            "latency_ms": {stage: spread(ms) for stage, ms in self.stages.items()} | {"total": spread(self.total)},
            "peak_memory_gib": round(model_gib + self.held_gib + max(self.peak_gib), 3),
            "resident_memory_gib": round(model_gib + self.held_gib, 3),
            "floor_ms": round(self.floor_ms, 3),
            "times_floor": round(median(self.total) / self.floor_ms, 2),
        }


def random_model(name: str, dtype: str, device: str, attn_implementation: str) -> Adapter:
    """A model with the shape of ``name`` and random weights. Its times equal those of trained weights."""
    config, folder = stand_in(name)
    family, tokenizer = FAMILIES[config.model_type], AutoTokenizer.from_pretrained(folder)
    vision = config.vision_config
    fields = ("patch_size", "temporal_patch_size", "spatial_merge_size")
    own = {key.replace("spatial_merge", "merge"): getattr(vision, key) for key in fields if hasattr(vision, key)}
    processor = family.image_processor_class.from_pretrained(folder, **own if config.model_type == "qwen3_vl" else {})
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attn_implementation
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return family(model.eval(), tokenizer, processor)


def n_text(adapter: Adapter, prompt: Prompt) -> int:
    """Number of text tokens in a prompt."""
    nothing = [Visual(rows=torch.empty(0, 0), grid=None)] * len(prompt.images)
    return len(adapter.tokenize(prompt, nothing).ids)


def prepare(config: dict[str, Any]) -> tuple[Adapter, Prompt]:
    """The model and the prompt, with its image already processed."""
    if config["weights"] == "random":
        options = config["model"]
        adapter = random_model(options["name"], options["dtype"], build.device(config), options["attn_implementation"])
    else:
        adapter = copy(build.model(config))
    benchmark = build.benchmark(config)
    sample = benchmark.samples()[0]
    images = benchmark.images(sample.image_id)
    if config["image_size"] is not None:
        images = [image.resize(tuple(config["image_size"])) for image in images]
    prompt = Prompt(sample.text, images, sample=sample.id)
    while n_text(adapter, prompt) < (config["n_text"] or 0):
        prompt = replace(prompt, text=f"the {prompt.text}")
    process, ready = adapter.preprocess, {}

    def once(image: Media) -> dict[str, Any]:
        if (key := identity(image)) not in ready:
            ready[key] = process(image)
        return ready[key]

    vars(adapter)["preprocess"] = once  # of this copy alone
    return adapter, prompt


def shortest_ms(adapter: Adapter, limits: dict[str, float], n_visual: int, n_prefill: int, n_new: int) -> float:
    """Lower bound of the time of an answer in ms: weights read once per forward pass, FLOPs of vision and prefill."""
    config = adapter.model.config
    lm: Any = adapter.language_model
    head: Any = adapter.model.lm_head
    weights = sum(p.nbytes for p in [*lm.layers.parameters(), *head.parameters()])
    read_ms = weights / limits["copy_gb_per_s"] / 1e6
    flops_ms = 1e-9 / limits["product_tflop_per_s"]
    prefill = Decoder.of(config.get_text_config()).prefill_flops(n_prefill)
    vision = vision_flops(config, n_visual) or 0
    return vision * flops_ms + max(read_ms, prefill * flops_ms) + (n_new - 1) * read_ms


def subjects(
    config: dict[str, Any], adapter: Adapter, prompt: Prompt, limits: dict[str, float]
) -> tuple[list[Subject], list[str]]:
    """All combinations after warm-up, and a line with the reason for each impossible combination."""
    decoding = Decoding(max_new_tokens=config["max_new_tokens"])
    memory = Memory(adapter.device)
    found, left_out = [], []
    for method in config["methods"]:
        pruner = build.method(method, config)
        name, _ = results.parse_method(method)
        budgets = [1.0] if name == "none" else config["keeps"]
        for keep in budgets:
            answer = Pipeline(adapter, pruner, keep, decoding)([prompt])[0]
            n_visual, kept = sum(answer.n_visual), answer.visual_tokens_per_layer
            n_prefill = n_text(adapter, prompt) + round(fmean(kept))
            for engine in config["engines"]:
                before = memory.reserved()
                try:
                    run = ENGINES[engine](adapter, pruner, keep, decoding, prompt)
                    for _ in range(max(1, config["warmup"])):
                        n_new = run(lambda stage: nullcontext())
                except InputError as error:
                    left_out.append(f"{method} keep={keep} engine={engine}: {error}")
                    continue
                held = max(0.0, memory.reserved() - before)
                n_seen = kept[0] if isinstance(pruner, ImagePruner) else n_visual
                floor = shortest_ms(adapter, limits, n_seen, n_prefill, min(n_new + 1, decoding.max_new_tokens))
                found.append(Subject(method, keep, engine, run, n_visual, kept, floor, held, n_new))
    return found, left_out


def compare(
    found: list[Subject], repetitions: int, seed: int, device: torch.device, clock: Callable[[], float]
) -> None:
    """Run all combinations ``repetitions`` times in random order."""
    memory = Memory(device)
    jobs = found * repetitions
    random.Random(seed).shuffle(jobs)
    for subject in jobs:
        watch = Stopwatch(device, clock)
        subject.run(watch)
        for stage, ms in watch.ms.items():
            subject.stages[stage].append(ms)
        memory.reset_peak()
        before, whole = memory.now(), Stopwatch(device, clock)
        with whole("total"):
            subject.run(lambda stage: nullcontext())
        subject.total.append(whole.ms["total"])
        subject.peak_gib.append(max(0.0, memory.peak() - before))


def show(record: dict[str, Any]) -> str:
    """Table as text: medians in ms, fastest first."""
    stages = ("vision", "scoring", "prefill", "decode", "generate", "total")
    lines = []
    for row in sorted(record["rows"], key=lambda row: row["latency_ms"]["total"]["median"]):
        ms, total = row["latency_ms"], row["latency_ms"]["total"]
        medians = [f"{ms[stage]['median']:.2f}" if stage in ms else "" for stage in stages]
        rest = [f"{total['p20']:.1f}-{total['p80']:.1f}", f"{row['times_floor']:.2f}", f"{row['peak_memory_gib']:.2f}"]
        lines.append([row["method"], str(row["keep"]), row["engine"], *medians, *rest])
    head = ["method", "keep", "engine", *stages, "p20-p80", "floor x", "peak GiB"]
    return Table(head, lines).terminal()


def measure(config: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure all combinations of a config.

    Raises
    ------
    InputError
        If it names an unknown clock, engine or method, or the model cannot be built.
    """
    words: list[tuple[str, Collection[str]]] = [(config["clock"], CLOCKS)]
    for word, known in [*words, *((engine, ENGINES) for engine in config["engines"])]:
        if word not in known:
            raise InputError(f"unknown {word!r}: choose {', '.join(known)}")
    adapter, prompt = prepare(config)
    device, dtype = adapter.device, adapter.model.dtype
    clock = CLOCKS[config["clock"]]
    limits = measure_limits(device, dtype, clock)
    model_gib = Memory(device).now()
    found, left_out = subjects(config, adapter, prompt, limits)
    compare(found, config["repetitions"], config["seed"], device, clock)
    return {
        **provenance(overrides, device),
        "limits": {name: round(value, 3) for name, value in limits.items()},
        "model": config["model"]["name"],
        "weights": config["weights"],
        "dtype": str(dtype).removeprefix("torch."),
        "text_tokens": n_text(adapter, prompt),
        "clock": config["clock"],
        "repetitions": config["repetitions"],
        "left_out": left_out,
        "rows": [subject.row(model_gib) for subject in found],
    }


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    record = measure(config, overrides)
    print(show(record))
    for line in record["left_out"]:
        print(f"left out: {line}")
    name = f"{record['model']}-{record['date'].replace(':', '')}.json"
    out = Path(config["out"] or Path(config["results"]) / "efficiency" / name)
    results.write_record(out, record)
    print(out)
    print(json.dumps(record))
