"""Runs or resumes one cell and prints its record."""

from collections.abc import Sequence
from typing import Any

from experiments import build
from experiments.cell import Draw, differs, run_cell, show
from experiments.ranks import Ranks
from experiments.results import Cell


def run(config: dict[str, Any], overrides: Sequence[str] = (), draw: Draw | None = None) -> None:
    config = build.resolve(config)
    record = run_cell(config, overrides, Ranks.join(), draw)
    if record:
        print(show(record, str(Cell(config, differs(overrides, config["seed"])).path)))
