"""Writes records of the hard questions only, from stored records.

    python -m analysis.hard                       # results -> results_hard
    python -m analysis.tables --results results_hard --out docs/results/hard
    python -m analysis.figures --results results_hard --out docs/results/hard

A question is hard at a budget if the model answers it right with all tokens, and wrong after down-sampling to the same
number of tokens (VTC-Bench's filter). Each record is written again for these questions only: accuracies, standard
errors and counts. Costs, and scores that are not a mean over questions (F1, MME's sum), are omitted.
"""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from analysis.command import arguments
from experiments.metrics import mean_percent, standard_error
from experiments.results import read_answers, write_record

Key = tuple[str, str, str]
MARK = ".hard"
"""Marker file of a folder that this script wrote and may empty."""


def read(results: Path) -> list[tuple[Path, dict[str, Any], list[dict[str, Any]]]]:
    """Folder, record and answered samples of every finished cell with per-sample answers."""
    return [
        (path.parent, json.loads(path.read_text(encoding="utf-8")), read_answers(path.parent))
        for path in sorted(results.glob("*/*/*/*/record.json"))
        if path.with_name("samples.jsonl").exists()
    ]


def questions_of(record: dict[str, Any]) -> Key:
    """Model and questions of a record."""
    return record["cell"]["model"], record["cell"]["dataset"], json.dumps(record["config"]["dataset"], sort_keys=True)


def right(rows: list[dict[str, Any]]) -> set[str]:
    return {row["id"] for row in rows if (row["correct"] or 0) >= 0.5}


def hard_questions(cells: list, method: str) -> dict[Key, dict[str, set[str]]]:
    """Ids of the hard questions by model and questions, then by budget."""
    full = {questions_of(record): right(rows) for _, record, rows in cells if record["cell"]["pruner"] == "none"}
    hard: dict[Key, dict[str, set[str]]] = defaultdict(dict)
    for _, record, rows in cells:
        key = questions_of(record)
        if record["cell"]["pruner"] == method and key in full:
            ids = {row["id"] for row in rows}
            hard[key][str(record["cell"]["keep"])] = (full[key] & ids) - right(rows)
    return hard


def restricted(record: dict[str, Any], rows: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """The record for these rows only."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name in {"accuracy", row["task"], f"{row['task']}_accuracy", f"accuracy_{row['task']}"}:
            groups[name].append(row["correct"] or 0.0)
    groups = {name: groups[name] for name in record["metrics"] if name in groups}
    ids = {row["id"] for row in rows}
    return record | {
        "n_samples": len(rows),
        "failed": [one for one in record["failed"] if one["id"] in ids],
        "metrics": {name: mean_percent(group) for name, group in groups.items()},
        "standard_errors": {name: 100 * standard_error(group) for name, group in groups.items() if len(group) > 1},
        "provenance": record["provenance"] | {"only": f"right with all tokens, wrong with as many from {method}"},
    }


def restrict(results: Path, out: Path, method: str = "downsample") -> dict[Key, dict[str, set[str]]]:
    """Write the records of the hard questions under ``out``, which is emptied before. Returns those questions.

    Budgets without a record of ``method`` or without a hard question are omitted. The record of all tokens has the
    questions that are hard at any budget.

    Raises
    ------
    ValueError
        If no question is left, or ``out`` has other content.
    """
    cells = read(results)
    hard = hard_questions(cells, method)
    if not any(ids for by_budget in hard.values() for ids in by_budget.values()):
        raise ValueError(f"{results} has no question that none answers and {method} does not: run both, with a budget")
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise ValueError(f"{out} contains other files: give another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()
    for folder, record, rows in cells:
        by_budget = hard.get(questions_of(record), {})
        is_full = record["cell"]["pruner"] == "none"
        ids = set().union(*by_budget.values()) if is_full else by_budget.get(str(record["cell"]["keep"]), set())
        if not (rows := [row for row in rows if row["id"] in ids]):
            continue
        copy = out / folder.relative_to(results)
        write_record(copy / "record.json", restricted(record, rows, method))
        (copy / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return hard


def main() -> None:
    parser = arguments(__doc__, out="results_hard", reads_results=True)
    parser.add_argument(
        "--method", default="downsample", choices=["downsample", "resize"], help="(default: downsample)"
    )
    args = parser.parse_args()
    try:
        hard = restrict(args.results, args.out, args.method)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    for (model, dataset, _), by_budget in hard.items():
        counts = ", ".join(f"{len(ids)} at keep={keep}" for keep, ids in by_budget.items())
        print(f"{model} {dataset}: hard questions {counts}")
    print(args.out)


if __name__ == "__main__":
    main()
