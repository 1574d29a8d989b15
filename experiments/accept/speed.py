"""Section 8: compares time and memory with the paper's Table 3, measured like `task=efficiency`.

Times depend on the GPU, so a time is compared as a ratio to the time of MI-Pruner with lam=1 at the same budget. Peak
memory depends on the model and the method, and is compared directly.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from experiments.accept import scores
from experiments.accept.published import read
from experiments.accept.report import Line, check, not_run

TABLE, REFERENCE = "table3", "mi lam=1"
TIME, MEMORY = 0.25, 0.1
"""Relative differences that pass: for time ratios, and for peak memory."""


def check_speed(
    compose: Callable[[list[str]], dict[str, Any]],
    measure: Callable[[dict[str, Any]], dict[str, Any]],
    model: str,
    device: torch.device,
) -> Iterator[Line]:
    """Lines for every number of Table 3.

    Parameters
    ----------
    compose : callable
        The resolved config of a list of overrides, for this model.
    measure : callable
        The record of `task=efficiency` for a config.
    """
    printed = [row for row in read(scores.PAPER) if (row["table"], row["model"]) == (TABLE, model)]
    if not printed or device.type != "cuda":
        reason = (
            "the paper prints none of this model" if not printed else f"the device is {device.type}: a GPU's figures"
        )
        yield not_run("time and memory", reason, source="the paper, table3")
        return
    methods = list(dict.fromkeys(named(row) for row in printed))
    keeps = list(dict.fromkeys(row["keep"] for row in printed))
    words = ["task=efficiency", f"dataset={printed[0]['dataset']}", "engines=[pipeline]", "n_text=60"]
    record = measure(compose([*words, f"methods={methods}", f"keeps=[{','.join(keeps)}]"]))
    found = {(row["method"], str(row["keep"])): row for row in record["rows"]}
    paper = {(named(row), row["keep"], row["metric"]): float(row["value"]) for row in printed}
    for method, keep, metric in paper:
        yield compare(method, keep, metric, paper, found)


def named(row: dict[str, str]) -> str:
    """Name of a method in `task=efficiency`."""
    return f"{row['method']} {row['setting']}".strip()


def compare(
    method: str,
    keep: str,
    metric: str,
    paper: dict[tuple[str, str, str], float],
    found: dict[tuple[str, str], dict[str, Any]],
) -> Line:
    """Line for one number; ``found`` is the rows of an efficiency record."""
    printed, row, source = paper[method, keep, metric], found[method, keep], "the paper, table3"
    if metric == "peak_memory_gib":
        value = row["peak_memory_gib"]
        passed = abs(value / printed - 1) <= MEMORY
        return check(
            f"{method} at {keep}: peak memory", passed, f"{printed} GiB", f"{value:.2f} GiB", f"{MEMORY:.0%}", source
        )
    ms, base = (found[key]["latency_ms"]["total"]["median"] for key in ((method, keep), (REFERENCE, keep)))
    wanted = printed / paper[REFERENCE, keep, metric]
    passed = abs(ms / base / wanted - 1) <= TIME
    return check(
        f"{method} at {keep}: time over that of {REFERENCE}",
        passed,
        f"{wanted:.2f} ({printed} ms)",
        f"{ms / base:.2f} ({ms:.1f} ms)",
        f"{TIME:.0%}: another GPU",
        source,
    )
