"""Score answers that another program wrote, with this repository's rules, and write them as a record of `run.py`.

    python run.py task=rescore file=answers.jsonl dataset=scienceqa model=llava15_13b pruner=none
    python run.py task=rescore file=random.jsonl prefix=random/ dataset=pope model=llava15_13b pruner=none

The file has a JSON object a line with ``question_id`` and ``text``, as LLaVA's evaluation writes it. ``prefix`` and the
question_id are the id of a sample here; with a prefix only the samples that begin with it are scored. The words of the
command say which cell of the tables the answers are. A question without an answer counts as wrong and stands in
``failed``; of several answers to one question the last counts, as in LLaVA's scripts; answers to no question are
counted. No model is loaded.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments import build
from experiments.benchmarks.base import Sample, read_samples
from experiments.cell import differs, show
from experiments.evaluate import finish
from experiments.remote import UNKNOWN
from experiments.results import Cell, command
from mipruner.errors import InputError
from mipruner.models.chat import END_OF_THINKING


def read_answers(path: Path) -> tuple[dict[str, str], int]:
    """The text by question_id, and how many lines answered a question again.

    Raises
    ------
    InputError
        If the file cannot be read, or a line is no object with question_id and text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the answers in {path}: {error}") from error
    found: dict[str, str] = {}
    n = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found[str(row["question_id"])] = said(row["text"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}, line {number} is no JSON object with question_id and text: {error!r}") from error
        n += 1
    return found, n - len(found)


def said(text: str) -> str:
    """An answer without the thinking before it and the blanks around it."""
    return text.rpartition(END_OF_THINKING)[2].strip()


def rows_of(samples: Sequence[Sample], answers: dict[str, str], prefix: str) -> list[dict[str, Any]]:
    """Rows of samples.jsonl, ``correct`` still open."""
    rows = []
    for sample in samples:
        row = {key: getattr(sample, key) for key in ("id", "image_id", "task", "question", "answer")}
        answer = answers.get(sample.id.removeprefix(prefix))
        row |= {"prediction": answer, "correct": None, "notes": {}} | dict.fromkeys(UNKNOWN)
        rows.append(row if answer is not None else row | {"error": "the file has no answer to it"})
    return rows


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    config = build.resolve(config)
    if config["file"] is None:
        raise InputError("give file, the answers: a JSON line each with question_id and text")
    path, prefix = Path(config["file"]), config["prefix"]
    started = datetime.now(UTC).isoformat(timespec="seconds")
    answers, n_again = read_answers(path)
    benchmark = build.benchmark(config)
    samples = [sample for sample in read_samples(benchmark) if sample.id.startswith(prefix)]
    ids = {sample.id.removeprefix(prefix) for sample in samples}
    if not ids & answers.keys():
        shown = [next(iter(known), "none") for known in (sorted(answers), [sample.id for sample in samples])]
        raise InputError(
            f"no question_id of {path} is one of this dataset's, such as {shown[0]!r} there and {shown[1]!r} here: "
            "give prefix, or another dataset"
        )
    n_unknown = len(answers.keys() - ids)
    config["file"] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    cell = Cell(config, differs(overrides, config["seed"]))
    about = {"answers": path.name, "answered_again": n_again, "answers_to_no_question": n_unknown}
    with cell.alone():
        cell.open(overwrite=True)
        cell.append(rows_of(samples, answers, prefix))
        costs = {"device": f"answers of {path.name}", "batch_size": None, "peak_memory_gib": None}
        costs |= {"waited_for_images": None}
        record = finish(cell, benchmark, samples, {"command": command(overrides), "started": started, **costs})
        record["provenance"] |= about
        cell.finish(record)
    print(show(record, str(cell.path)))
    for count, what in ((n_again, "answers came again, the last counts"), (n_unknown, "answers are to no question")):
        if count:
            print(f"  warning: {count} {what}", file=sys.stderr)
