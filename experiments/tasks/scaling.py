"""Measures the time of token selection over the numbers of visual and kept tokens.

    python run.py task=scaling
    python run.py task=scaling n_visual=[576,2304] keeps=[64,0.25] out=docs/results/scaling.csv

Methods get random features of LLaVA-1.5-7B's width. Each row of the CSV is one method at one size, with device,
versions and date. Rows are appended. ``prefill_saved_ms`` is the saved prefill time of LLaVA-1.5-7B: its FLOPs at the
speed of a large matrix product measured in the same run. On a CPU, one thread runs and times are CPU times, so other
processes do not count. On a GPU, times are wall times. The last line printed is the rows as JSON.
"""

import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from experiments import build, results
from experiments.flops import Decoder, architecture
from experiments.machine import Memory, machine, spread
from mipruner import pmi
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.fused import mi_picks
from mipruner.graphs import Graph
from mipruner.pruners.base import DecoderView
from mipruner.pruners.cdpruner import CDPruner
from mipruner.pruners.dart import DARTPruner
from mipruner.pruners.divprune import DivPruner
from mipruner.selection import budget, greedy
from mipruner.timing import Stopwatch

SAVED_ON = "llava15_7b"


def mi(visual: Tensor, text: Tensor, n_keep: int) -> Tensor:
    return mi_picks(visual, text, n_keep, lam=0.5)


def mi_relevance(visual: Tensor, text: Tensor, n_keep: int) -> Tensor:
    return mi_picks(visual, text, n_keep, lam=1.0)


def mi_plain(visual: Tensor, text: Tensor, n_keep: int) -> Tensor:
    """The plain computation of `mi`, step by step."""
    return greedy(pmi.relevance(visual, text), pmi.redundancy(visual), n_keep, 0.5)


def cdpruner(visual: Tensor, text: Tensor, n_keep: int) -> Tensor:
    return CDPruner(relevance="projection").select(Features(visual, text), n_keep).indices


def divprune(visual: Tensor, text: Tensor, n_keep: int) -> Tensor:
    return DivPruner().select(Features(visual, text), n_keep).indices


def dart_like(visual: Tensor, text: Tensor, n_keep: int) -> Tensor:
    """DART's rule, with the tokens instead of decoder states and keys."""
    tokens = torch.cat([visual, text])
    is_visual = torch.arange(len(tokens), device=visual.device) < len(visual)
    view = DecoderView(
        layer=2, n_layers=32, n_start=len(visual), hidden=tokens, visual=is_visual, attention=lambda x: x,
        keys=tokens[:, None], norm=lambda x: x, prompt=tokens, prompt_visual=is_visual,
    )  # fmt: skip
    return DARTPruner(exact=True).reduce(view, n_keep).indices


def product(visual: Tensor, text: Tensor, n_keep: int) -> Tensor:
    """The float32 product of eq. 15 alone."""
    return visual.float() @ visual.float().mT


METHODS = (product, mi, mi_relevance, mi_plain, cdpruner, divprune, dart_like)


def methods(device: torch.device) -> dict[str, Callable[[Tensor, Tensor, int], Callable[[], Any]]]:
    """Methods by name, as functions that return a call without arguments. On a GPU also as CUDA graphs."""
    found: dict[str, Any] = {method.__name__: partial(partial, method) for method in METHODS}
    if device.type == "cuda":
        for method in (mi, mi_relevance):
            found[f"{method.__name__}_graph"] = partial(recorded, method)
    return found


def recorded(method: Callable, visual: Tensor, text: Tensor, n_keep: int) -> Callable[[], Any]:
    return partial(Graph(partial(method, n_keep=n_keep), visual, text), visual, text)


def elapsed_ms(device: torch.device, function: Callable[[], Any]) -> float:
    """CPU time of the process on a CPU, wall time on a GPU."""
    watch = Stopwatch(device, time.process_time if device.type == "cpu" else time.perf_counter)
    with watch("call"):
        function()
    return watch.ms["call"]


def tokens(n: int, width: int, device: torch.device, seed: int) -> Tensor:
    """Random tokens [n, width] with the average cosine of about 0.2 that projected patches have."""
    shared = torch.randn(width, generator=torch.Generator().manual_seed(0))
    own = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return (own + 0.5 * shared).to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)


def measure(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure row by row. A method that was too slow is skipped at larger sizes."""
    device = torch.device(build.device(options))
    text = tokens(options["n_text"], options["width"], device, seed=1)
    side, decoder = (1536, 8192)[device.type == "cuda"], Decoder.of(architecture(SAVED_ON).text_config)
    square = torch.randn(side, side, device=device).to(text.dtype)
    ms = min(elapsed_ms(device, lambda: square @ square) for _ in range(10))
    tflop_per_s = 2 * side**3 / ms / 1e9
    conditions = {
        "device": machine(device).get("cpu", results.device_name(device)),
        "dtype": str(text.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "git_commit": results.git_commit(),
        "date": results.now(),
    }
    memory, running = Memory(device), methods(device)
    if options["methods"] is not None:
        if unknown := set(options["methods"]) - running.keys():
            raise InputError(f"unknown method {unknown.pop()!r}: choose {', '.join(running)}")
        running = {name: running[name] for name in options["methods"]}
    for n_visual in sorted(options["n_visual"]):
        slow = set()
        visual = tokens(n_visual, options["width"], device, seed=2)
        for n_keep in sorted({budget(keep, n_visual) for keep in options["keeps"]}):
            saved = decoder.prefill_flops(n_visual + 60) - decoder.prefill_flops(n_keep + 60)
            for name, method in running.items():
                call = method(visual, text, n_keep)
                memory.reset_peak()
                before, first = memory.now(), [elapsed_ms(device, call)]
                peak_gib = max(0.0, memory.peak() - before)
                slow_call = first[0] >= 1000  # else the first call was the warm-up
                times = first if slow_call else [elapsed_ms(device, call) for _ in range(options["repetitions"])]
                if median(times) > 1000 * options["most_s"]:
                    slow.add(name)
                sizes = {"n_visual": n_visual, "n_keep": n_keep, "n_text": len(text), "width": options["width"]}
                found: dict[str, Any] = {f"{word}_ms": value for word, value in spread(times).items()}
                found |= {
                    "repetitions": len(times),
                    "peak_gib": round(peak_gib, 4),
                    "prefill_saved_ms": round(saved / tflop_per_s / 1e9, 3),
                }
                yield {"method": name} | sizes | found | conditions
        running = {name: method for name, method in running.items() if name not in slow}


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    torch.set_num_threads(1)
    out = Path(config["out"] or Path(config["results"]) / "scaling.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    print(f"{'n_visual':>8} {'n_keep':>7}  {'method':<14}{'ms':>11}")
    with out.open("a", encoding="utf-8", newline="") as file:
        for row in measure(config):
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            rows.append(row)
            print(f"{row['n_visual']:>8} {row['n_keep']:>7}  {row['method']:<14}{row['median_ms']:>11.2f}", flush=True)
    print(out)
    print(json.dumps(rows))
