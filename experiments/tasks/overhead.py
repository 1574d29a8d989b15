"""Measures the time of `generate` inside `mipruner.prune`, against `generate` on the full and on the short prompt.

    OMP_NUM_THREADS=1 python run.py task=overhead out=docs/results/overhead_demo_llava_cpu.json
    OMP_NUM_THREADS=1 python run.py task=overhead model=demo_qwen3vl +model.max_pixels=451584 'image_size=[672,672]'
    OMP_NUM_THREADS=1 python run.py task=overhead 'compile=[encoder,decoder]'

Four calls run in random order, all with the same number of new tokens:

    stock       generate on the whole prompt
    everything  the same inside prune(model, pruner, keep=1.0)
    pruned      the same inside prune(model, pruner, keep)
    ideal       the vision encoder alone, then generate on a prompt of text as long as the short one

The encoder does the same work in all four calls and takes most of the time of some models, so it is timed apart: the
time of a call is its own time outside the encoder plus the mean time in the encoder of the round's four calls. A ratio
is the median over rounds; the calls of a round run directly after each other. The last line printed is the result as
JSON.
"""

import inspect
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from tqdm import tqdm

import mipruner
from experiments import build, results
from experiments.benchmarks.base import Sample
from experiments.machine import CLOCKS, provenance, spread
from experiments.tabular import Table
from mipruner.errors import InputError
from mipruner.models import Adapter, Prompt
from mipruner.selection import budget

Call = Callable[[], object]


def inputs_of(adapter: Adapter, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Output of a processor for prompts with one image each, padded on the left."""
    pixels = [adapter.preprocess(prompt.images[0]) for prompt in prompts]
    seen = adapter.encode(pixels)
    rows = [adapter.tokenize(prompt, [visual]).ids for prompt, visual in zip(prompts, seen, strict=True)]
    length = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows])
    padding = [torch.arange(length) >= length - len(row) for row in rows]
    found = {"input_ids": ids, "attention_mask": torch.stack(padding).long()}
    found |= {name: torch.cat([one[name] for one in pixels]) for name in pixels[0]}
    found = {f"image_{name}" if name == "grid_thw" else name: x.to(adapter.device) for name, x in found.items()}
    found["pixel_values"] = found["pixel_values"].to(adapter.model.dtype)
    found["mm_token_type_ids"] = adapter.is_placeholder(found["input_ids"]).int()
    taken = inspect.signature(adapter.model.forward).parameters
    return {name: x for name, x in found.items() if name in taken}


def calls(config: dict[str, Any], adapter: Adapter, inputs: dict[str, Tensor]) -> tuple[dict[str, Call], int]:
    """The four calls, and the number of visual tokens of a prompt."""
    model: Any = adapter.model
    n_new = config["max_new_tokens"]
    options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}
    (n_visual,) = set(adapter.is_placeholder(inputs["input_ids"]).sum(1).tolist())
    batch, length = inputs["input_ids"].shape
    word = inputs["input_ids"][0, -1].item()
    text = torch.full((batch, length - n_visual + budget(config["keep"], n_visual)), word, device=adapter.device)
    short = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    see = model.model.get_image_features
    images = {name: x for name, x in inputs.items() if name in inspect.signature(see).parameters}

    def stock() -> None:
        model.generate(**inputs, **options)

    def ideal() -> None:
        see(**images)
        model.generate(**short, **options)

    def inside(keep: int | float) -> Call:
        pruning = mipruner.prune(model, build.pruner(config), keep, tokenizer=adapter.tokenizer)

        def run() -> None:
            with pruning:
                model.generate(**inputs, **options)

        return run

    every = {"stock": stock, "everything": inside(1.0), "pruned": inside(config["keep"]), "ideal": ideal}
    return every, n_visual


class Stopwatch:
    """Milliseconds by clock, in total and in the calls of one module."""

    def __init__(self, encoder: torch.nn.Module, device: torch.device) -> None:
        self.device = device
        self.starts = self.encoder = dict.fromkeys(CLOCKS, 0.0)
        encoder.register_forward_pre_hook(lambda *_: self.enter())
        encoder.register_forward_hook(lambda *_: self.leave())

    def now(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {clock: 1e3 * now() for clock, now in CLOCKS.items()}

    def since(self, starts: dict[str, float]) -> dict[str, float]:
        return {clock: now - starts[clock] for clock, now in self.now().items()}

    def enter(self) -> None:
        self.starts = self.now()

    def leave(self) -> None:
        for clock, ms in self.since(self.starts).items():
            self.encoder[clock] += ms

    def __call__(self, call: Call) -> dict[str, tuple[float, float]]:
        """Time of a call by clock: outside the module, and in it."""
        self.encoder = dict.fromkeys(CLOCKS, 0.0)
        starts = self.now()
        call()
        return {clock: (ms - self.encoder[clock], self.encoder[clock]) for clock, ms in self.since(starts).items()}


def take_turns(every: dict[str, Call], config: dict[str, Any], stopwatch: Stopwatch) -> dict[str, dict[str, list]]:
    """Milliseconds outside the encoder and in it, by clock and call, one pair per round."""
    ms: dict[str, dict[str, list]]
    ms = {clock: {name: [] for name in every} for clock in CLOCKS}
    shuffle = random.Random(config["seed"]).shuffle
    for k in tqdm(range(-config["warmup"], config["repetitions"]), unit="round", leave=False):
        order = list(every)
        shuffle(order)
        for name in order:
            for clock, pair in stopwatch(every[name]).items():
                ms[clock][name] += [pair] if k >= 0 else []
    return ms


def row(batch: int, n_visual: int, n_keep: int, ms: dict[str, dict[str, list]]) -> dict[str, Any]:
    """The result of one batch size, from pairs of milliseconds outside the encoder and in it."""
    found: dict[str, Any] = {"batch": batch, "visual_tokens": n_visual, "kept": n_keep}
    found |= {"ms": {}, "encoder_ms": {}, "everything_over_stock": {}, "share_of_ideal_saving": {}}
    for clock, pairs in ms.items():
        found["encoder_ms"][clock] = {name: spread([inside for _, inside in own]) for name, own in pairs.items()}
        encoder = [mean(inside for _, inside in of_round) for of_round in zip(*pairs.values(), strict=True)]
        times = {
            name: [outside + inside for (outside, _), inside in zip(own, encoder, strict=True)]
            for name, own in pairs.items()
        }
        rounds = list(zip(*(times[name] for name in ("stock", "everything", "pruned", "ideal")), strict=True))
        found["ms"][clock] = {name: spread(values) for name, values in times.items()}
        found["everything_over_stock"][clock] = spread([everything / stock for stock, everything, _, _ in rounds])
        shares = [(stock - pruned) / (stock - ideal) for stock, _, pruned, ideal in rounds]
        found["share_of_ideal_saving"][clock] = spread(shares)
    return found


@torch.inference_mode()
def measure(config: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    adapter, benchmark = build.model(config), build.benchmark(config)
    first: dict[str, Sample] = {}
    for sample in benchmark.samples():
        first.setdefault(sample.image_id, sample)
    if len(first) < max(config["batches"]):
        raise InputError(f"{config['dataset']['name']} has {len(first)} images: make batches smaller")
    prompts = []
    for sample in list(first.values())[: max(config["batches"])]:
        image = benchmark.images(sample.image_id)[0]
        prompts.append(Prompt(sample.text, [image.resize(config["image_size"]) if config["image_size"] else image]))
    rows = []
    model: Any = adapter.model
    parts = {"encoder": model.get_encoder(modality="image"), "decoder": model.get_decoder()}
    if unknown := set(config["compile"]) - parts.keys():
        raise InputError(f"compile={unknown.pop()}: choose encoder, decoder or both")
    for name in config["compile"]:
        parts[name].compile()
    stopwatch = Stopwatch(parts["encoder"], adapter.device)
    with torch._dynamo.config.patch(recompile_limit=64):  # four kinds of calls in turn; a program has one or two
        for n in config["batches"]:
            every, n_visual = calls(config, adapter, inputs_of(adapter, prompts[:n]))
            rows.append(row(n, n_visual, budget(config["keep"], n_visual), take_turns(every, config, stopwatch)))
    return {
        **provenance(overrides, adapter.device),
        **{group: config[group]["name"] for group in ("model", "pruner")},
        "dtype": str(adapter.model.dtype).removeprefix("torch."),
        "compiled": config["compile"],
        "new_tokens": config["max_new_tokens"],
        "repetitions": config["repetitions"],
        "rows": rows,
    }


def show(record: dict[str, Any]) -> str:
    """Markdown table of CPU time on a CPU, or wall time on a GPU."""
    clock = "cpu" if "cpu" in record["machine"] else "wall"
    compiled = [f"{part} compiled" for part in record.get("compiled", ())]
    subject = ", ".join([record["model"], record["dtype"], *compiled])
    head = [
        f"{subject}, ms of {clock} time",
        "encoder",
        "stock",
        "keep=1.0",
        "pruned",
        "ideal",
        "keep=1.0 / stock",
        "share of the ideal saving",
    ]
    lines = []
    for one in record["rows"]:
        ms = [f"{one['encoder_ms'][clock]['stock']['median']:.1f}"]
        ms += [f"{one['ms'][clock][name]['median']:.1f}" for name in ("stock", "everything", "pruned", "ideal")]
        ratio, share = one["everything_over_stock"][clock], one["share_of_ideal_saving"][clock]
        told = [f"{ratio['median']:.3f} ({ratio['p20']:.3f} to {ratio['p80']:.3f})"]
        told += [f"{share['median']:.0%} ({share['p20']:.0%} to {share['p80']:.0%})"]
        lines.append([f"batch {one['batch']}, {one['kept']} of {one['visual_tokens']}", *ms, *told])
    return Table(head, lines).markdown()


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    record = measure(build.resolve(config), overrides)
    print(show(record))
    if config["out"] is not None:
        results.write_record(Path(config["out"]), record)
    print(json.dumps(record))
