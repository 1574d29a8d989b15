"""Measures the time of token selection of MI-Pruner and other methods, as ratios to one float32 product.

    python run.py task=peers
    python run.py task=peers sizes=[[576,64]] out=docs/results/peers_cpu

One process, one thread, random tokens of LLaVA-1.5-7B's width. At each size all methods and the product V V^T run in
random order. Times are CPU times of the process, so other processes do not count. Memory is the increase of the process
during the first call. The exponent is the slope of log time over log tokens.

``from scratch`` rows are `experiments.peers`: the computation of the released code in plain torch. The other rows are
the implementations of this repository. Encoder features are random, of width 1024.
"""

import ctypes
import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments import peers, results
from experiments.machine import Memory, provenance, spread
from experiments.tabular import Table
from experiments.tasks import scaling
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.fused import mi_picks, row_norm
from mipruner.product import ON_ZEN, gemm
from mipruner.pruners.mi import MIPruner
from mipruner.pruners.mmtok import MMTokPruner
from mipruner.pruners.vispruner import VisPruner

PRODUCT = "product"
CPU = torch.device("cpu")
ENCODER_WIDTH = 1024
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

TITLES = {
    PRODUCT: "the float32 product V Vᵀ alone",
    "mi": "**MI, λ = 0.5**",
    "mi_bfloat16": "**MI, λ = 0.5, tokens in bfloat16**",
    "mi_again": "**MI, λ = 0.5, a further question about the image**",
    "mi_relevance": "**MI, λ = 1**",
    "mi_plain": "MI, λ = 0.5, step by step",
    "cdpruner": "CDPruner",
    "cdpruner_scratch": "CDPruner, from scratch",
    "divprune": "DivPrune",
    "divprune_scratch": "DivPrune, from scratch",
    "mmtok": "MMTok",
    "mmtok_scratch": "MMTok, from scratch",
    "vispruner": "VisPruner",
    "vispruner_scratch": "VisPruner, from scratch",
    "dart_like": "DART's rule on the tokens",
}

Call = Callable[[], Any]


def methods(n_visual: int, n_keep: int, options: dict[str, Any]) -> dict[str, Call]:
    """Calls at one size, by name."""
    visual, text = (
        scaling.tokens(n, options["width"], CPU, seed) for n, seed in ((n_visual, 2), (options["n_text"], 1))
    )
    hidden = scaling.tokens(n_visual, ENCODER_WIDTH, CPU, seed=3)
    attention = torch.rand(n_visual, generator=torch.Generator().manual_seed(4))
    features = Features(visual, text, hidden=hidden, attention=attention)
    half, half_text = visual.bfloat16(), text.bfloat16()
    held: dict = {}
    found: dict[str, Call] = {method.__name__: partial(method, visual, text, n_keep) for method in scaling.METHODS}
    found |= {
        "mi_bfloat16": lambda: mi_picks(half, half_text, n_keep, 0.5),
        "mi_again": lambda: mi_picks(visual, text, n_keep, 0.5, held=held),
        "mmtok": lambda: MMTokPruner().order(features, n_keep),
        "vispruner": lambda: VisPruner().select(features, n_keep).indices,
        "cdpruner_scratch": lambda: peers.cdpruner(visual, closeness(visual, text), n_keep),
        "divprune_scratch": lambda: peers.divprune(visual, n_keep),
        "mmtok_scratch": lambda: peers.mmtok(visual, text, hidden, n_keep),
        "vispruner_scratch": lambda: peers.vispruner(attention, hidden, n_keep),
    }
    if n_visual > options["width"]:
        del found["mi_again"]  # the stored results would be larger than the tokens
    else:
        found["mi_again"]()
    return {name: found[name] for name in TITLES if name in found}


def closeness(visual: Tensor, text: Tensor) -> Tensor:
    """Mean cosine [n_visual] to the question, the relevance of CDPruner without CLIP."""
    return (peers.unit(visual) @ peers.unit(text).T).mean(-1)


def over_a_vocabulary(n_visual: int, n_keep: int, n_words: int, options: dict[str, Any]) -> dict[str, Call]:
    """Calls with support="vocabulary" for this many words: a new image, and a further question about it."""
    visual = scaling.tokens(n_visual, options["width"], CPU, seed=2).bfloat16()
    table = torch.randn(n_words, options["width"], generator=torch.Generator().manual_seed(5)).bfloat16()
    norm, pruner = row_norm(table), MIPruner(0.5, support="vocabulary")
    held: dict[Any, Any] = {}

    def ask(held: dict | None) -> Tensor:
        features = Features(visual, table[:20], vocabulary=table, vocabulary_norm=norm, held=held)
        return pruner.picks(features, n_keep)

    ask(held)
    return {f"vocabulary_{n_words}": lambda: ask(None), f"vocabulary_{n_words}_again": lambda: ask(held)}


def title(name: str) -> str:
    if name in TITLES:
        return TITLES[name]
    _, n_words, *again = name.split("_")
    return f"**MI over {int(n_words):,} words (bfloat16), {'a further question' if again else 'a new image'}**"


def measured(calls: dict[str, Call], repetitions: int, bar: tqdm) -> dict[str, dict[str, Any]]:
    """Time and memory of each call. A call of over a second is repeated twice, of over ten seconds not at all."""
    memory = Memory(CPU)
    found: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        bar.set_postfix_str(name)
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # else it would reuse memory that the previous call released
        memory.reset_peak()
        before, ms = memory.now(), scaling.elapsed_ms(CPU, call)
        found[name] = {"peak_mib": round(max(0.0, memory.peak() - before) * 1024, 1), "ms": [ms] if ms > 1000 else []}
        bar.update()
    jobs = [
        name
        for name, row in found.items()
        for _ in range(repetitions if not row["ms"] else 2 * (name == PRODUCT or row["ms"][0] < 10000))
    ]
    random.shuffle(jobs)
    bar.reset(len(calls) + len(jobs))
    bar.update(len(calls))
    for name in jobs:
        bar.set_postfix_str(name)
        found[name]["ms"].append(scaling.elapsed_ms(CPU, calls[name]))
        bar.update()
    return found


def expected_ms(rows: list[dict[str, Any]], name: str, n_visual: int) -> float:
    """Expected time of a method at a size, from its exponent so far, or proportional to the square of the tokens."""
    own = [row for row in rows if row["method"] == name]
    if not own:
        return 0.0
    slope = exponent(own) if len({row["n_visual"] for row in own}) > 1 else 2.0
    return own[-1]["median_ms"] * (n_visual / own[-1]["n_visual"]) ** max(slope, 2.0)


def exponent(rows: list[dict[str, Any]]) -> float:
    """Slope of log time over log tokens between the smallest and the largest size."""
    small, large = min(rows, key=lambda row: row["n_visual"]), max(rows, key=lambda row: row["n_visual"])
    return math.log(large["median_ms"] / small["median_ms"]) / math.log(large["n_visual"] / small["n_visual"])


def measure(options: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of every method and size, and a line for each that was skipped."""
    rows: list[dict[str, Any]] = []
    left_out = []
    for k, (n_visual, n_keep) in enumerate(sorted(options["sizes"])):
        calls = methods(n_visual, n_keep, options)
        for n_words in options["n_words"] if k == 0 else ():
            calls |= over_a_vocabulary(n_visual, n_keep, n_words, options)
        if options["methods"] is not None:
            if unknown := set(options["methods"]) - {*TITLES, *calls}:
                raise InputError(f"unknown method {unknown.pop()!r}: choose {', '.join(calls)}")
            calls = {name: call for name, call in calls.items() if name in (PRODUCT, *options["methods"])}
        for name in list(calls):
            if (ms := expected_ms(rows, name, n_visual)) > 1000 * options["most_s"] and name != PRODUCT:
                left_out.append(f"{name} at {n_visual} tokens to {n_keep}: it would take about {ms / 1000:.0f} s")
                del calls[name]
        with tqdm(total=len(calls), desc=f"{n_visual} tokens to {n_keep}", file=sys.stderr) as bar:
            found = measured(calls, options["repetitions"], bar)
        product = median(found[PRODUCT]["ms"])
        for name, row in found.items():
            times = {f"{word}_ms": value for word, value in spread(row["ms"]).items()}
            size = {"n_visual": n_visual, "n_keep": n_keep}
            more = {"repetitions": len(row["ms"]), "ratio": median(row["ms"]) / product, "peak_mib": row["peak_mib"]}
            rows.append({"method": name} | size | times | more)
            print(
                f"{n_visual:>6} {n_keep:>5}  {name:<24}{times['median_ms']:>11.2f} ms {more['ratio']:>9.3f}", flush=True
            )
    return rows, left_out


def flags() -> dict[str, bool]:
    """Instruction sets of this processor that affect the speed of the product."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text(encoding="utf-8").split()) if info.exists() else set()
    ways = {"bfloat16 by oneMKL": gemm() is not None, "float32 by oneDNN": ON_ZEN}
    return {flag: flag in words for flag in FLAGS} | ways


def page(record: dict[str, Any]) -> str:
    """The record as Markdown: ratios to the product, exponent, and memory at the largest size of a method."""
    rows, conditions = record["rows"], record["machine"]
    sizes = sorted({(row["n_visual"], row["n_keep"]) for row in rows})
    names = list(dict.fromkeys(row["method"] for row in rows))
    head = ["choice", *(f"{n:,} to {k:,}" for n, k in sizes), "exponent", "memory, MiB"]
    lines = []
    for name in names:
        own = {(row["n_visual"], row["n_keep"]): row for row in rows if row["method"] == name}
        ratios = [f"{own[size]['ratio']:.2f}" if size in own else "" for size in sizes]
        if name == PRODUCT:
            ratios = [f"{own[size]['median_ms']:,.1f} ms" for size in sizes]
        slope = f"{exponent(list(own.values())):.1f}" if len({n for n, _ in own}) > 1 else ""
        largest = own[max(own)]
        lines.append([title(name), *ratios, slope, f"{largest['peak_mib']:,.0f} at {largest['n_visual']:,}"])
    table = Table(head, lines).markdown()
    has = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in conditions["flags"].items())
    said = (
        f"CPU time over that of the product in the same run. {conditions.get('cpu', conditions['device'])} ({has}), "
        f"{conditions['threads']} thread, torch {record['versions']['torch']}, width {record['width']}, "
        f"commit {record['git_commit']}, {record['date'][:10]}. `{record['command']}`"
    )
    left_out = [f"Left out: {line}." for line in record["left_out"]]
    return "\n\n".join([table, said, *left_out]) + "\n"


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, left_out = measure(config)
        record = provenance(overrides, CPU)
        record["machine"] |= {"flags": flags()}
        record |= {
            "width": config["width"],
            "n_text": config["n_text"],
            "left_out": left_out,
            "rows": rows,
        }
    finally:
        torch.set_num_threads(threads)
    out = Path(config["out"] or Path(config["results"]) / "peers")
    results.write_record(out.with_suffix(".json"), record)
    results.write_atomic(out.with_suffix(".md"), page(record))
    print(page(record))
    print(f"{out}.json, {out}.md")
