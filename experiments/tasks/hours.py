"""Calculates the number of answers and a lower bound of the GPU hours of each experiment of the paper.

    python run.py task=hours

The hours are a lower bound from data sheets, not a measurement: FLOPs of vision and prefill at the peak rate of the
tensor cores, one read of the weights per new token at the peak bandwidth, batch 1, no time for images or Python.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from experiments.results import ROOT
from experiments.tabular import Cell, Span, Table
from experiments.tasks.estimate import estimate
from mipruner.errors import InputError

CARDS = {"H100 SXM": (989, 3.35), "A100 80 GB": (312, 2.04), "RTX 4090": (165, 1.01)}
"""Dense bfloat16 TFLOP/s, and TB/s, from the data sheet of each GPU."""

QUESTIONS = {
    "gqa": 12578, "scienceqa": 2017, "textvqa": 5000, "mmvet": 218, "mme": 2114, "pope": 9000, "tgif": 1000,
    "msvd": 1000, "msrvtt": 1000,
}  # fmt: skip
NEW_TOKENS = {"mmvet": 150}
"""Number of tokens of an answer; 3 for other datasets."""

N_VISUAL = {"qwen": 1024, "video": 2048}
"""Assumed number of visual tokens if it is not fixed, by the start of the model's name."""

SEEDED = ("random",)
"""Random pruners: they run once per seed, the others once."""


@dataclass(frozen=True)
class Row:
    experiment: str
    answers: int
    hours: dict[str, float]


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    print(table(rows()).markdown())


def table(found: Sequence[Row]) -> Table:
    lines: list[Sequence[Cell]] = [
        [Span(row.experiment, "code"), f"{row.answers:,}", *(f"{row.hours[card]:.1f}" for card in CARDS)]
        for row in found
    ]
    return Table(["experiment", "answers", *(f"{card}, h" for card in CARDS)], lines)


def rows() -> list[Row]:
    """One row for each experiment over models with a known shape and public benchmarks."""
    found = []
    for path in sorted((ROOT / "conf/experiment").glob("*.yaml")):
        sweep = (yaml.safe_load(path.read_text(encoding="utf-8")).get("hydra") or {}).get("sweeper", {}).get("params")
        if not sweep or not set(words(sweep, "dataset")) <= QUESTIONS.keys() or "thinking" in path.stem:
            continue  # the length of thinking is unknown
        try:
            found.append(row_of(path.stem, sweep))
        except InputError:
            continue
    return found


def words(sweep: dict[str, Any], key: str, default: str = "") -> list[str]:
    return str(sweep.get(key, default)).split(",")


def row_of(name: str, sweep: dict[str, Any]) -> Row:
    answers, hours = 0, dict.fromkeys(CARDS, 0.0)
    other = [key for key in sweep if key not in ("model", "dataset", "pruner", "keep", "seed")]
    for model in words(sweep, "model"):
        n_visual = next((n for start, n in N_VISUAL.items() if model.startswith(start)), None)
        for pruner in words(sweep, "pruner", "mi"):
            for keep in ["1.0"] if pruner == "none" else words(sweep, "keep", "64"):
                cost = estimate(model, float(keep) if "." in keep else int(keep), n_visual)
                repeats = len(words(sweep, "seed")) if pruner in SEEDED else 1
                for key in other:
                    repeats *= len(words(sweep, key))
                for dataset in words(sweep, "dataset"):
                    n = repeats * QUESTIONS[dataset]
                    answers += n
                    for card, (tflops, tb_per_s) in CARDS.items():
                        prefill = (cost["prefill_tflop"]["pruned"] + (cost["vision_tflop"] or 0)) / tflops
                        decode = NEW_TOKENS.get(dataset, 3) * cost["weights_gib"] * 2**30 / tb_per_s / 1e12
                        hours[card] += n * (prefill + decode) / 3600
    return Row(name, answers, hours)
