"""Checks a model on this machine: weights, prompts, exactness, picks, scores. Writes one report.

    python run.py task=accept model=llava15_7b                   minutes: weights, prompts, exactness, picks
    python run.py task=accept model=llava15_7b level=scores      an hour: and the published unpruned scores
    python run.py task=accept model=llava15_7b level=paper       hours: and the paper's pruned scores, times and memory

The report is in results/accept/<model>/: report.md for people, report.json for programs. The same command resumes an
interrupted acceptance. The exit status is 1 if a line fails.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from experiments import build, results
from experiments.accept.cost import announce, cost_of
from experiments.accept.environment import HEADROOM, check_environment, check_weights, free_gib
from experiments.accept.exactness import check_full, check_pruned
from experiments.accept.method import check_method
from experiments.accept.prompts import check_prompts
from experiments.accept.report import FAIL, PASS, Line, Report, not_run
from experiments.accept.scores import check_paper, check_scores
from experiments.accept.speed import check_speed
from experiments.cell import run_cell
from experiments.results import ROOT
from experiments.tasks.efficiency import measure
from mipruner.errors import InputError
from mipruner.models.hub import locate

LEVELS = ("quick", "scores", "paper")


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    """Run the acceptance. Exits with status 1 if a line fails."""
    if status := accept(config, overrides):
        sys.exit(status)


def accept(config: dict[str, Any], overrides: Sequence[str] = ()) -> int:
    """Check the model of a resolved config. Returns the exit status.

    Raises
    ------
    InputError
        If ``level`` is not quick, scores or paper.
    """
    level, n_images = config["level"], config["n_images"]
    if level not in LEVELS:
        raise InputError(f"unknown level {level!r}: choose {', '.join(LEVELS)}")
    device = torch.device(build.device(config))
    local = ROOT / config["model"]["path"]
    config = config | {"model": config["model"] | {"path": str(local if local.is_dir() else config["model"]["path"])}}
    cost = cost_of(config)
    report = Report(Path(config["results"]) / "accept" / config["model"]["name"], head(config, device, overrides))
    print(announce(config, level, n_images, device, cost), file=sys.stderr)
    for line in all_lines(report, config, overrides, device, cost):
        mark = {PASS: "pass", FAIL: "FAIL"}.get(line.status, "  - ")
        print(f"{mark}  {line.name}: {line.found}" + (f" (expected {line.expected})" if line.status == FAIL else ""))
    print(f"{config['model']['name']}: {report.verdict}\n{report.folder}/report.md")
    return int(bool(report.failed))


def all_lines(
    report: Report, config: dict[str, Any], overrides: Sequence[str], device: torch.device, cost: dict[str, Any] | None
) -> Iterator[Line]:
    """Run the sections in order. If the model does not load, the sections that need it are skipped."""
    yield from report.run("1 Environment", lambda: check_environment(config, device, cost))
    yield from report.run("2 Weights", lambda: check_weights(config, partial(build.model, config)))
    name, n_images = config["model"]["name"], config["n_images"]
    if report.sections["2 Weights"][-1].status == FAIL:
        return
    adapter = build.model(config)  # that of section 2, or read again if that section was stored
    folder = locate(config["model"]["path"], config["model"]["revision"])
    yield from report.run("3 Prompt", lambda: check_prompts(adapter, name, folder))
    yield from report.run("4 Exactness, everything kept", lambda: check_full(adapter, n_images))
    yield from report.run("4 Exactness, pruned", lambda: check_pruned(adapter, n_images))
    if adapter.model.dtype != torch.float32:
        yield from report.run("4 Exactness, float32", lambda: check_float32(config, device, cost))
    yield from report.run("5 Method", lambda: check_method(adapter))
    if config["level"] == "quick":
        return

    compose_cell = partial(compose_evaluation, overrides)
    yield from report.run("6 Scores", lambda: check_scores(compose_cell, run_cell, name))
    if config["level"] == "paper":
        yield from report.run("7 Paper", lambda: check_paper(compose_cell, run_cell, name))
        yield from report.run("8 Time and memory", lambda: check_speed(compose_cell, measure, name, device))


def compose_evaluation(overrides: Sequence[str], words: list[str]) -> dict[str, Any]:
    """Resolved config of one cell, from the given overrides of model, device and folders, and those of the cell.

    ``dataset.path=ROOT`` is a folder with one folder per dataset, named as in conf/dataset.
    """
    given = [
        word for word in overrides if word.split("=")[0].split(".")[0] in ("model", "device", "results", "batch_size")
    ]
    root = next((word.partition("=")[2] for word in overrides if word.startswith("dataset.path=")), None)
    names = dict(word.split("=", 1) for word in words)
    if root is not None and (Path(root) / names["dataset"]).is_dir():
        words = [*words, f"dataset.path={Path(root) / names['dataset']}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return build.resolve(compose("config", [*given, *words, "n_masks=0"]))


def check_float32(config: dict[str, Any], device: torch.device, cost: dict[str, Any] | None) -> Iterator[Line]:
    """Check keep=1.0 again in float32, if a second copy of the weights fits into memory."""
    name = "keep=1.0 in float32"
    if cost is None or free_gib(device) < 2 * HEADROOM * cost["weights_gib"]:
        yield not_run(name, "a float32 copy of the weights does not fit in the free memory")
        return
    adapter = build.model(config | {"model": config["model"] | {"dtype": "float32"}})
    yield from check_full(adapter, config["n_images"])


def head(config: dict[str, Any], device: torch.device, overrides: Sequence[str]) -> dict[str, Any]:
    """Head of the report. Its identity changes with everything that can change a line."""
    facts = {
        "model": config["model"]["name"],
        "command": shlex.join(["python", "run.py", *overrides]),
        "git_commit": results.git_commit(),
        "versions": results.versions(),
        "device": results.device_name(device),
    }
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(Path(config["model"]["path"]).glob("*"))
    ]
    told = json.dumps([config["model"], config["n_images"], facts | {"command": None}, files], sort_keys=True)
    return facts | {"identity": hashlib.sha256(told.encode()).hexdigest()[:16]}
