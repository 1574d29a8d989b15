"""Evaluates a dataset through vLLM and in the pipeline, and compares every answer.

    python run.py task=agreement                                   the demo's table
    python run.py task=agreement model=demo_qwen3vl dataset=demo_canvases keeps=[0.25,0.11]

Both evaluations are ordinary cells, so stored answers are not computed again; overwrite=true does. The server refuses
methods that vLLM cannot run, see docs/serving.md.
"""

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import build, conf
from experiments.cell import run_cell
from experiments.remote import setting_of
from experiments.results import Cell, write_atomic
from experiments.served import serve
from experiments.tabular import Table
from experiments.tasks.serving import require_vllm

OWN = ("pruners", "keeps", "server", "port", "out")
"""Keys of conf/task/agreement.yaml, which are no part of a cell."""


def cells(config: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Configs of a pruner's cells, one per budget: those of ``run.py``, without the keys of this task."""
    evaluated = {key: value for key, value in config.items() if key not in OWN}
    whole = build.resolved(evaluated | {"pruner": conf.read("pruner", name)})
    return [whole | {"keep": keep} for keep in (config["keeps"] if name != "none" else [1.0])]


def compared(config: dict[str, Any], name: str, log: Path) -> Iterator[dict[str, Any]]:
    """One row for each budget of a pruner."""
    asked = cells(config, name)
    setting = None if name == "none" else setting_of(asked[0], 1.0)
    options = ["--dtype", config["model"]["dtype"], *shlex.split(config["server"])]
    engine = conf.read("engine", "server")
    with serve(build.weights(config["model"]["path"]), setting, log, *options, port=config["port"]) as served:
        remote = [build.resolve(one | {"engine": engine | {"base_url": served.url}}) for one in asked]
        records = [run_cell(one) for one in remote]
    for one, there, record in zip(asked, remote, records, strict=True):
        here = build.resolve(one | {"engine": {"name": "pipeline"}})
        own = run_cell(here)
        answers = [{row["id"]: row["prediction"] for row in Cell(cell).rows()} for cell in (there, here)]
        yield {
            "pruner": name,
            "keep": one["keep"],
            "n": len(answers[1]),
            "equal": sum(answers[0].get(key) == value for key, value in answers[1].items()),
            "metrics": own["metrics"] == record["metrics"] and own["standard_errors"] == record["standard_errors"],
            "server": next(iter(record["metrics"].values())),
            "pipeline": next(iter(own["metrics"].values())),
        }


def table(rows: Sequence[dict[str, Any]], metric: str) -> str:
    head = ["method", "keep", "questions", "answers equal", f"{metric}, server", f"{metric}, pipeline", "all metrics"]
    lines = []
    for row in rows:
        counts = [str(row[name]) for name in ("keep", "n", "equal")]
        scores = [f"{row[name]:.2f}" for name in ("server", "pipeline")]
        lines.append([row["pruner"], *counts, *scores, "equal" if row["metrics"] else "DIFFER"])
    return Table(head, lines).markdown() + "\n"


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    require_vllm()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server is stopped at the end
    out = Path(config["out"] or Path(config["results"]) / "agreement" / f"{config['model']['name']}.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for name in config["pruners"] for row in compared(config, name, out.with_suffix(".log"))]
    text = table(rows, "accuracy")
    write_atomic(out, text)
    print(text)
    if any(row["equal"] < row["n"] or not row["metrics"] for row in rows):
        sys.exit("the server and the pipeline do not agree")
