"""What a method costs on this machine: time of each stage, end to end, memory, all methods side by side in one process.

    python -m experiments.efficiency                                         the demo, on whatever is here
    python -m experiments.efficiency experiment=table3                       Table 3: LLaVA-1.5-7B, random weights
    python -m experiments.efficiency estimate model=qwen3vl_8b keep=0.25 n_visual=1024     no weights, no GPU

Every combination of method, budget and engine answers one prompt `warmup` times, then `repetitions` times more in
random order among all others, so that drift of clocks and caches hits all alike. Each repetition runs twice, once with
a clock around each stage (at which the host waits for the device) and once with only two readings at the ends.

Engines: `pipeline` is what evaluations run, `engine` is `mipruner.engine`, `generate` gives the pipeline's short prompt
to transformers' own `generate`. The floor of a combination is the time in which this device reads the weights of the
language model once a forward pass and does the FLOPs of vision and prefill, at the copy bandwidth and matrix product
speed that are measured in the same run.

The last line printed is the result as JSON; it is also written to ``out``.
"""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from experiments import build, results
from experiments.estimate import Decoder, architecture, estimate, vision_flops
from experiments.results import ROOT
from mipruner.decoding import Decoding
from mipruner.engine import Engine
from mipruner.errors import InputError, ModelError
from mipruner.models import FAMILIES, Adapter, Prompt
from mipruner.pipeline import Pipeline, VisionCache
from mipruner.prompt import Visual, collate
from mipruner.pruners import DecoderPruner, Pruner
from mipruner.timing import Stopwatch

STAND_INS = {"llava": "experiments/demo/llava", "qwen3_vl": "experiments/demo/qwen3vl"}
"""Whose tokenizer and image processor serve a model of random weights: the costs do not depend on which words."""


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""CPU time of the process is for one thread on a busy CPU: what others do there does not count."""

Budget = int | float
Method = Pruner | DecoderPruner


@dataclass
class Subject:
    """One combination of method, budget and engine, and what was measured of it.

    Attributes
    ----------
    run : callable
        Answers the prompt, given a clock for its stages; returns the number of new tokens.
    held_gib : float
        What it holds on the device between two runs besides the model: static buffers and recorded graphs.
    """

    method: str
    keep: Budget
    engine: str
    run: Callable[[Callable], int]
    n_visual: int
    tokens_per_layer: list[int]
    floor_ms: float
    held_gib: float = 0.0
    n_new: int = 0
    stages: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    total: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)

    def row(self, model_gib: float) -> dict[str, Any]:
        """The result, with peak and resident memory as if no other subject were there."""
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


def spread(ms: list[float]) -> dict[str, float]:
    """Median, and the 20th and 80th percentile."""
    cuts = quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else [ms[0]] * 4
    return {"median": round(median(ms), 3), "p20": round(cuts[0], 3), "p80": round(cuts[3], 3)}


class Memory:
    """Memory in GiB: of the allocator on a GPU, of the process on a CPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def reset_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark of resident memory

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else self._of_process("VmHWM")

    def now(self) -> float:
        return torch.cuda.memory_allocated() / 2**30 if self.on_gpu else self._of_process("VmRSS")

    def reserved(self) -> float:
        """With what recorded graphs keep for themselves, which no tensor holds."""
        if not self.on_gpu:
            return self.now()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() / 2**30

    def _of_process(self, key: str) -> float:
        if sys.platform != "linux":
            return results.peak_memory_gib(torch.device("cpu"))
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[key].split()[0]) / 2**20


def measure(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> dict[str, float]:
    """Speed limits of the device: copy bandwidth in GB/s (bytes read and written), matrix product in TFLOP/s."""
    n_bytes, side = (2**30, 8192) if device.type == "cuda" else (2**27, 1536)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    copy_ms = fastest(Stopwatch(device, clock), lambda: target.copy_(source))
    product_ms = fastest(Stopwatch(device, clock), lambda: torch.mm(a, a, out=out))
    return {"copy_gb_per_s": 2 * n_bytes / copy_ms / 1e6, "product_tflop_per_s": 2 * side**3 / product_ms / 1e9}


def fastest(watch: Stopwatch, function: Callable[[], Any], repetitions: int = 10) -> float:
    """Shortest time of a call in ms."""
    for repetition in range(repetitions):
        with watch(str(repetition)):
            function()
    return min(watch.ms.values())


def random_model(name: str, dtype: str, device: str, attn_implementation: str) -> Adapter:
    """A model with the shape of ``name`` and random weights, which take as long as trained ones."""
    config = architecture(name)
    if config.model_type not in STAND_INS:
        raise InputError(f"random weights are for {', '.join(STAND_INS)} models, and {name} is a {config.model_type}")
    folder = ROOT / STAND_INS[config.model_type]
    family, tokenizer = FAMILIES[config.model_type], AutoTokenizer.from_pretrained(folder)
    for key, value in vars(AutoConfig.from_pretrained(folder)).items():
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            setattr(config, key, value)
    processor = family.image_processor_class.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attn_implementation
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return family(model.eval(), tokenizer, processor)


def n_text(adapter: Adapter, prompt: Prompt) -> int:
    """Tokens beside the picture."""
    nothing = [Visual(rows=torch.empty(0, 0), grid=None)] * len(prompt.images)
    return len(adapter.tokenize(prompt, nothing).ids)


def pipeline_engine(adapter: Adapter, pruner: Method, keep: Budget, decoding: Decoding, prompt: Prompt) -> Callable:
    pipeline = Pipeline(adapter, pruner, keep, decoding)

    def run(watch: Callable) -> int:
        pipeline.cache, pipeline.watch = VisionCache(), watch
        return len(pipeline([prompt])[0].tokens)

    return run


def static_engine(adapter: Adapter, pruner: Method, keep: Budget, decoding: Decoding, prompt: Prompt) -> Callable:
    engine = Engine(adapter, pruner, keep, decoding, compiled=adapter.device.type == "cuda")

    def run(watch: Callable) -> int:
        engine.watch = watch
        return len(engine(prompt).tokens)

    return run


def generate_engine(adapter: Adapter, pruner: Method, keep: Budget, decoding: Decoding, prompt: Prompt) -> Callable:
    if not isinstance(pruner, Pruner):
        raise InputError(f"{type(pruner).__name__} prunes inside the decoder: use the pipeline")
    pipeline = Pipeline(adapter, pruner, keep, decoding)

    @torch.inference_mode()
    def run(watch: Callable) -> int:
        pipeline.cache, pipeline.watch = VisionCache(), watch
        seen = pipeline.see(prompt.images)
        with watch("scoring"):
            encoded = adapter.read(prompt, [seen[id(image)] for image in prompt.images], pruner.signals)
            selections = pipeline.select(encoded)
        with watch("generate"):
            batch = collate([adapter.shorten(encoded, selections)])
            if batch.deepstack:
                raise InputError("generate takes no deepstack rows beside embeddings")
            new = adapter.model.generate(
                inputs_embeds=batch.embeds,
                position_ids=batch.position_ids,
                attention_mask=torch.ones_like(batch.is_visual, dtype=torch.long),
                max_new_tokens=decoding.max_new_tokens,
                do_sample=False,
            )[0].tolist()
        end = adapter.model.generation_config.eos_token_id
        return next((k for k, token in enumerate(new) if token in (end if isinstance(end, list) else [end])), len(new))

    return run


ENGINES = {"pipeline": pipeline_engine, "engine": static_engine, "generate": generate_engine}


def read_config(overrides: list[str]) -> dict[str, Any]:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return OmegaConf.to_container(compose("efficiency", overrides), resolve=True)


def prepare(config: dict[str, Any]) -> tuple[Adapter, Prompt]:
    """The model, and the prompt that is answered, with its picture already processed."""
    if config["weights"] == "random":
        options = config["model"]
        adapter = random_model(options["name"], options["dtype"], build.device(config), options["attn_implementation"])
    else:
        adapter = copy(build.model(config))
    benchmark = build.benchmark(config)
    sample = benchmark.samples()[0]
    images = benchmark.images(sample.image_id)
    if config["picture"] is not None:
        images = [image.resize(tuple(config["picture"])) for image in images]
    prompt = Prompt(sample.text, images, sample=sample.id)
    while n_text(adapter, prompt) < (config["n_text"] or 0):
        prompt = replace(prompt, text=f"the {prompt.text}")
    ready = {id(image): adapter.pixels(image) for image in prompt.images}
    adapter.pixels = lambda image: ready[id(image)]
    return adapter, prompt


def shortest_ms(adapter: Adapter, limits: dict[str, float], n_visual: int, n_prefill: int, n_new: int) -> float:
    """Shortest possible time of an answer: weights read once a forward pass, FLOPs of vision and of the prefill."""
    config, lm = adapter.model.config, adapter.language_model
    weights = sum(p.nbytes for p in [*lm.layers.parameters(), *adapter.model.lm_head.parameters()])
    read_ms = weights / limits["copy_gb_per_s"] / 1e6
    flops_ms = 1e-9 / limits["product_tflop_per_s"]
    prefill = Decoder.of(config.get_text_config()).prefill_flops(n_prefill)
    vision = vision_flops(config, n_visual) or 0
    return vision * flops_ms + max(read_ms, prefill * flops_ms) + (n_new - 1) * read_ms


def subjects(
    config: dict[str, Any], overrides: list[str], adapter: Adapter, prompt: Prompt, limits: dict[str, float]
) -> tuple[list[Subject], list[str]]:
    """Every combination, warmed up; and a line for each that cannot be, with the reason."""
    decoding = Decoding(max_new_tokens=config["max_new_tokens"])
    memory = Memory(adapter.device)
    found, left_out = [], []
    for method in config["methods"]:
        name, *changes = method.split()
        pruner = build.pruner(read_config([*overrides, f"pruner={name}", *(f"pruner.{c}" for c in changes)]))
        budgets = [1.0] if name == "none" else config["keeps"]
        for keep in budgets:
            answer = Pipeline(adapter, pruner, keep, decoding)([prompt])[0]
            n_visual, kept = sum(answer.n_visual), answer.visual_tokens_per_layer
            n_prefill = n_text(adapter, prompt) + round(fmean(kept))
            for engine in config["engines"]:
                before = memory.reserved()
                try:
                    run = ENGINES[engine](adapter, pruner, keep, decoding, prompt)
                    for _ in range(config["warmup"]):
                        n_new = run(lambda stage: nullcontext())
                except InputError as error:
                    left_out.append(f"{method} keep={keep} engine={engine}: {error}")
                    continue
                held = max(0.0, memory.reserved() - before)
                floor = shortest_ms(adapter, limits, n_visual, n_prefill, min(n_new + 1, decoding.max_new_tokens))
                found.append(Subject(method, keep, engine, run, n_visual, kept, floor, held, n_new))
    return found, left_out


def compare(
    found: list[Subject], repetitions: int, seed: int, device: torch.device, clock: Callable[[], float]
) -> None:
    """Run everything ``repetitions`` times in random order."""
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


def command(module: str, overrides: list[str]) -> str:
    """What was typed, but for where the result went."""
    return shlex.join(["python", "-m", module, *(word for word in overrides if not word.startswith("out="))])


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    found = {"device": results.device_name(device), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        fields = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,driver_version"
        found["cuda"] = torch.version.cuda
        if shutil.which("nvidia-smi"):  # many containers are without it
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={uuid}"]
            values = subprocess.run(command, capture_output=True, text=True).stdout.strip().split(", ")
            found |= dict(zip(fields.split(","), values, strict=False))
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["cpu"] = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        found["load_average"] = os.getloadavg()[0]
    return found


def show(record: dict[str, Any]) -> str:
    """The table as a person reads it: medians in ms, fastest first."""
    stages = ("vision", "scoring", "prefill", "decode", "generate", "total")
    header = ["method", "keep", "engine", *stages, "p20-p80", "floor x", "peak GiB"]
    lines = [header]
    for row in sorted(record["rows"], key=lambda row: row["latency_ms"]["total"]["median"]):
        ms, total = row["latency_ms"], row["latency_ms"]["total"]
        medians = [f"{ms[stage]['median']:.2f}" if stage in ms else "" for stage in stages]
        rest = [f"{total['p20']:.1f}-{total['p80']:.1f}", f"{row['times_floor']:.2f}", f"{row['peak_memory_gib']:.2f}"]
        lines.append([row["method"], str(row["keep"]), row["engine"], *medians, *rest])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def run(overrides: list[str]) -> dict[str, Any]:
    """Measure everything that a config asks for."""
    config = read_config(overrides)
    for word, known in [(config["clock"], CLOCKS), *((engine, ENGINES) for engine in config["engines"])]:
        if word not in known:
            raise InputError(f"unknown {word!r}: choose {', '.join(known)}")
    adapter, prompt = prepare(config)
    device, dtype = adapter.device, adapter.model.dtype
    clock = CLOCKS[config["clock"]]
    limits = measure(device, dtype, clock)
    model_gib = Memory(device).now()
    found, left_out = subjects(config, overrides, adapter, prompt, limits)
    compare(found, config["repetitions"], config["seed"], device, clock)
    return {
        "command": command("experiments.efficiency", overrides),
        "git_commit": results.git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": results.versions(),
        "machine": machine(device),
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


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["estimate"]:
        print(json.dumps(estimate(**OmegaConf.to_container(OmegaConf.from_dotlist(arguments[1:]))), indent=1))
        return
    record = run(arguments)
    print(show(record))
    for line in record["left_out"]:
        print(f"left out: {line}")
    name = f"{record['model']}-{record['date'].replace(':', '')}.json"
    out = Path(read_config(arguments)["out"] or f"results/efficiency/{name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write_atomic(out, json.dumps(record, indent=1) + "\n")
    print(out)
    print(json.dumps(record))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, ModelError, HydraException, TypeError) as error:
        sys.exit(f"error: {error}")
