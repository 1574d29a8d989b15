"""Computes paired differences of two cells over questions, with standard errors clustered by image."""

import math
from functools import cache
from pathlib import Path

import pandas as pd

from experiments.results import read_answers


@cache
def answers(folder: Path) -> pd.DataFrame:
    """Image, task, correctness and number of kept tokens of each scored question of a cell, by id.

    Empty without ``samples.jsonl``.
    """
    rows = [
        (row["id"], row["image_id"], row.get("task"), row["correct"], sum(map(len, row.get("kept") or ())))
        for row in (read_answers(folder) if (folder / "samples.jsonl").exists() else ())
    ]
    frame = pd.DataFrame(rows, columns=["id", "image", "task", "correct", "kept"])
    return frame.set_index("id").dropna(subset="correct").astype({"correct": float})


def gains(cell: Path, other: Path) -> pd.DataFrame:
    """``gain`` of ``cell`` over ``other`` in points, image and task, for every question that both answered."""
    both = answers(cell).join(answers(other), how="inner", rsuffix="_other")
    return both[["image", "task"]].assign(gain=100 * (both.correct - both.correct_other))


def clustered(gains: pd.DataFrame) -> tuple[float, float]:
    """Mean gain over the questions, and its standard error clustered by image.

    With residuals e_i, n questions, C images: sqrt(C / (C - 1) sum_c (sum_{i in c} e_i)^2) / n. NaN for one image.
    """
    mean = gains.gain.mean()
    by_image = (gains.gain - mean).groupby(gains.image).sum()
    if (n_images := len(by_image)) < 2:
        return mean, math.nan
    return mean, math.sqrt(n_images / (n_images - 1) * (by_image**2).sum()) / len(gains)


def against(table: pd.DataFrame, method: str = "mi") -> dict[tuple, tuple[float, float]]:
    """Gain over ``method`` at the same budget, for each row (model, keep, method, setting) of a compared table.

    It is computed over the questions of all common datasets. If ``method`` has several rows, the first is used. Cells
    with several seeds are compared seed by seed.
    """
    measured = table[table.cell != ""].drop_duplicates(["model", "keep", "method", "setting", "dataset"])
    base: dict[tuple, str] = {}
    for number in measured[measured.method == method].itertuples():
        base.setdefault((number.model, number.keep, number.dataset), number.cell)
    found: dict[tuple, list[pd.DataFrame]] = {}
    for number in measured.itertuples():
        other = base.get((number.model, number.keep, number.dataset), number.cell)
        if other == number.cell:
            continue
        cells, others = number.cell.split(), other.split()
        others = others * len(cells) if len(others) == 1 else others
        pairs = [gains(Path(a), Path(b)) for a, b in zip(cells, others, strict=False)]
        key = (number.model, number.keep, number.method, number.setting)
        found.setdefault(key, []).extend(
            pair.assign(image=[f"{number.dataset}:{image}" for image in pair.image]) for pair in pairs if len(pair)
        )
    return {key: clustered(pd.concat(pairs)) for key, pairs in found.items() if pairs}
