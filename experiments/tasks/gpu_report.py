"""Runs all measurements that need a GPU, in under half an hour, and writes one page with pass or fail.

    python run.py task=gpu_report                     on a machine with one GPU
    python run.py task=gpu_report small=true          anywhere, to try the command itself
    python run.py task=gpu_report steps=[scaling,table3]

Each step is a separate command with a time limit. If one fails, the next still runs. The page has each goal with the
measured value, the reason if a step could not run, and the last lines of each command's output. Weights are random
(same times as trained weights), so nothing is downloaded. Please send the page to the project's issues.
"""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from experiments import build, results
from experiments.machine import machine
from experiments.results import ROOT
from experiments.tabular import Table
from mipruner.errors import InputError

GIB_OF_7B = 20
"""Memory in GiB for LLaVA-1.5-7B in 16 bits and its buffers."""

TAIL = 12
"""Number of output lines of a command on the page."""


@dataclass
class Step:
    """A command of the report.

    Attributes
    ----------
    name : str
    command : list of str
        Command without the interpreter.
    limit_s : float
        Time limit in seconds.
    missing : str
        Reason why it cannot run here; empty if it can.
    status : str
        "passed", "failed with status 2", ...; empty before it has run.
    """

    name: str
    command: list[str]
    limit_s: float
    missing: str = ""
    status: str = ""
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)

    def run(self) -> None:
        start = time.monotonic()
        if self.missing:
            self.status = f"not run: {self.missing}"
            return
        try:
            done = subprocess.run(
                [sys.executable, *self.command],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {"TQDM_DISABLE": "1"},
                text=True,
                timeout=self.limit_s,
            )
            self.status = "passed" if done.returncode == 0 else f"failed with status {done.returncode}"
            output: str | bytes = done.stdout
        except subprocess.TimeoutExpired as error:
            self.status = f"stopped after {self.limit_s:.0f} s"
            output = error.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        lines = [line.rsplit("\r", 1)[-1] for line in text.splitlines()]
        self.said = [line[:200] for line in lines if line.strip() and not line.startswith(("{", "[{"))][-TAIL:]
        self.seconds = time.monotonic() - start


def steps(small: bool, folder: Path, device: torch.device) -> list[Step]:
    """All steps, with output files in ``folder``."""
    run = ["run.py", f"results={folder}"]
    memory = torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else 0
    large = "" if small or memory >= GIB_OF_7B else f"a 7B model needs {GIB_OF_7B} GiB, and {memory:.0f} are free"
    short = ["warmup=1", "repetitions=2", "engines=[generate,engine]"]
    table = ["weights=random", "dataset=demo_pope", "warmup=3", "repetitions=10"]
    demo = ["model=demo_llava", "dataset=demo_pope", "n_text=null", *short]
    few = ["methods=[none,'mi lam=1','mi lam=0.5']"]
    if small:
        qwen = ["model=demo_qwen3vl", "dataset=demo_canvases", "keeps=[0.25]", "warmup=1", "repetitions=2"]
    else:
        qwen = ["model=qwen3vl_8b", "image_size=[640,480]", "n_text=60", "keeps=[0.111]", *table]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py", "tests/test_engine.py"]
    sizes = "n_visual=[64,128]" if small else "n_visual=[576,2304,16384]"
    return [
        Step("tests", [*tests, *(["-k", "keys or answer_ends"] if small else [])], 360),
        Step("scaling", [*run, "task=scaling", sizes, f"out={folder}/scaling.csv"], 240),
        Step("table3", _table(run, 3, [*demo, *few] if small else [*table, "keeps=[64]"], folder), 360, large),
        Step("table9", _table(run, 9, [*demo, *few] if small else table, folder), 300, large),
        Step("qwen", [*run, "task=efficiency", *qwen, *few, "engines=[pipeline,engine]"], 240, large),
        Step(
            "throughput",
            [*run, "task=throughput", f"limit={12 if small else 400}", f"out={folder}/throughput.json"],
            180,
        ),
        Step(
            "serving",
            [*run, "task=serving", f"requests={4 if small else 40}", f"out={folder}/serving.json"],
            120,
            "" if find_spec("vllm") else "vLLM is not installed",
        ),
    ]


def _table(run: list[str], number: int, words: list[str], folder: Path) -> list[str]:
    return [*run, f"experiment=table{number}", *words, f"out={folder}/table{number}.json"]


@dataclass
class Goal:
    """A value that a GPU should reach.

    Attributes
    ----------
    words : str
    measured : callable
        Returns the measured value in a folder, or None.
    at_most, at_least : float, optional
    """

    words: str
    measured: Callable[[Path], float | None]
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    def verdict(self, folder: Path, on_gpu: bool) -> tuple[str, str]:
        """The measured value, and pass or fail."""
        try:
            value = self.measured(folder)
        except (OSError, KeyError, ValueError, StopIteration, ZeroDivisionError):
            value = None
        if value is None:
            return "", "not measured"
        passed = value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0)
        shown = f"{value:.3g}{self.unit}"
        return shown, ("pass" if passed else "**fail**") if on_gpu else "no GPU: says nothing"


def goals(small: bool) -> list[Goal]:
    small_n, large_n, few = (64, 128, 16) if small else (576, 16384, 64)
    graph = "" if not torch.cuda.is_available() else "_graph"

    def scaled(method: str, n_visual: int, n_keep: int, column: str) -> Callable[[Path], float | None]:
        def find(folder: Path) -> float | None:
            rows = csv.DictReader((folder / "scaling.csv").open(encoding="utf-8"))
            sizes = {"method": method + graph, "n_visual": str(n_visual), "n_keep": str(n_keep)}
            return next(float(row[column]) for row in rows if sizes.items() <= row.items())

        return find

    def ratio(method: str) -> Callable[[Path], float | None]:
        """Time of `generate` with this method, over that of the engine with MI."""

        def total(folder: Path, *of: str) -> float:
            return _row(folder, *of)["latency_ms"]["total"]["median"]

        return lambda folder: total(folder, method, "generate") / total(folder, "mi lam=0.5", "engine")

    quarter = large_n // 4
    kept = f"{small_n} to {few}"
    return [
        Goal(f"MI, lam 0.5, {kept}", scaled("mi", small_n, few, "median_ms"), " ms", at_most=0.2),
        Goal(f"MI, lam 1, {kept}", scaled("mi_relevance", small_n, few, "median_ms"), " ms", at_most=0.2),
        Goal(f"MI, lam 0.5, {large_n} to {quarter}", scaled("mi", large_n, quarter, "median_ms"), " ms", at_most=20),
        Goal("memory of that choice", scaled("mi", large_n, quarter, "peak_gib"), " GiB", at_most=2),
        Goal(
            "engine over its floor, MI, Table 3",
            lambda folder: _row(folder, "mi lam=0.5", "engine")["times_floor"],
            " times",
            at_most=1.5,
        ),
        Goal("engine beside generate on the short prompt", ratio("mi lam=0.5"), " times", at_least=3),
        Goal("engine beside generate unpruned", ratio("none"), " times", at_least=5),
    ]


def _row(folder: Path, method: str, engine: str) -> dict[str, Any]:
    rows = json.loads((folder / "table3.json").read_text(encoding="utf-8"))["rows"]
    return next(row for row in rows if row["method"] == method and row["engine"] == engine)


def unable(device: torch.device) -> list[str]:
    """Missing requirements of this machine, as text."""
    found = [] if device.type == "cuda" else ["no GPU: nothing on this page is a figure of one"]
    for module, use in (("triton", "the kernels"), ("flash_attn", "flash attention"), ("vllm", "serving")):
        if find_spec(module) is None:
            found.append(f"{module} is not installed: {use} cannot be measured")
    return found


def page(done: Sequence[Step], folder: Path, small: bool, command: str) -> str:
    device = torch.device(build.device({"device": "auto"}))
    on_gpu = device.type == "cuda"
    tests = next((step.status for step in done if step.name == "tests"), "not run")
    lines = ["# GPU report", ""]
    said = ", ".join(f"{key} {value}" for key, value in machine(device).items())
    versions = ", ".join(f"{name} {version}" for name, version in results.versions().items() if version)
    lines += [f"{said}. {versions}. Commit {results.git_commit()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.", ""]
    lines += [f"`{command}`" + (", small: the command was tried, nothing was measured." if small else ""), ""]
    lines += [f"- {line}." for line in unable(device)]
    if tests.startswith("not run"):
        verdict = "not measured"
    elif tests != "passed":
        verdict = "**fail**"
    else:
        verdict = "pass" if on_gpu else "no GPU: says nothing"
    rows = [["kernels and engine equal the plain paths", "tests pass", tests, verdict]]
    for goal in goals(small):
        wanted = f"≤ {goal.at_most:g}" if goal.at_most is not None else f"≥ {goal.at_least:g}"
        rows.append([goal.words, f"{wanted}{goal.unit}", *goal.verdict(folder, on_gpu)])
    lines += ["", Table(["goal", "wanted", "measured", ""], rows).markdown(), ""]
    rows = [[step.name, step.status, f"`python {' '.join(step.command)}`", f"{step.seconds:.0f}"] for step in done]
    lines.append(Table(["step", "", "command", "s"], rows, n_text=3).markdown())
    for step in done:
        if step.said:
            lines += ["", f"## {step.name}", "", "```", *step.said, "```"]
    return "\n".join(lines).replace(str(folder), "FOLDER") + "\n"


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    out = Path(config["out"] or Path(config["results"]) / "gpu_report.md").absolute()
    folder = out.with_suffix(".parts")
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("scaling.csv", "table3.json", "table9.json", "throughput.json", "serving.json"):
        (folder / old).unlink(missing_ok=True)  # no value of an earlier run
    small, device = config["small"], torch.device(build.device(config))
    every = steps(small, folder, device)
    names = [step.name for step in every]
    if unknown := set(config["steps"] or ()) - set(names):
        raise InputError(f"unknown step {unknown.pop()!r}: choose {', '.join(names)}")
    done = [step for step in every if config["steps"] is None or step.name in config["steps"]]
    for k, step in enumerate(done):
        print(f"{step.name} ({k + 1} of {len(done)}, at most {step.limit_s:.0f} s) ...", flush=True)
        step.run()
        print(f"{step.name}: {step.status}", flush=True)
        results.write_atomic(out, page(done[: k + 1], folder, small, results.command(overrides)))
    print(out.read_text(encoding="utf-8"))
    print(out)
