"""Scores answers of another program with the rules of this repository, and writes a record like `run.py`.

    python run.py task=rescore file=answers.jsonl dataset=scienceqa model=llava15_13b pruner=none
    python run.py task=rescore file=random.jsonl prefix=random/ dataset=pope model=llava15_13b pruner=none

The file has one JSON object per line with ``question_id`` and ``text``, as in LLaVA's evaluation. The id of a sample is
``prefix`` + question_id. With a prefix, only samples whose id begins with it are scored. The overrides define the cell
of the answers. A question without an answer counts as wrong and is listed in ``failed``. If a question has several
answers, the last one counts, as in LLaVA's scripts. Answers without a question are counted. No model is loaded.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import build
from experiments.benchmarks.base import Sample, read_samples
from experiments.cell import differs, show
from experiments.evaluate import finish
from experiments.remote import UNKNOWN
from experiments.results import Cell, begin
from mipruner.errors import InputError
from mipruner.models.chat import END_OF_THINKING


def read_answers(path: Path) -> tuple[dict[str, str], int]:
    """Text by question_id, and the number of repeated answers.

    Raises
    ------
    InputError
        If the file cannot be read, or a line is not an object with question_id and text.
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
    """Text of an answer, without thinking and without blanks at its ends."""
    return text.rpartition(END_OF_THINKING)[2].strip()


def rows_of(samples: Sequence[Sample], answers: dict[str, str], prefix: str) -> list[dict[str, Any]]:
    """Rows of samples.jsonl without ``correct``."""
    rows = []
    for sample in samples:
        answer = answers.get(sample.id.removeprefix(prefix))
        row = sample.row() | {"prediction": answer, "notes": {}} | dict.fromkeys(UNKNOWN)
        rows.append(row if answer is not None else row | {"error": "the file has no answer to it"})
    return rows


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    config = build.resolve(config)
    if config["file"] is None:
        raise InputError("give file, the answers: a JSON line each with question_id and text")
    path, prefix = Path(config["file"]), config["prefix"]
    begun = begin(overrides)
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
        record = finish(cell, benchmark, samples, begun | costs)
        record["provenance"] |= about
        cell.finish(record)
    print(show(record, str(cell.path)))
    for count, what in ((n_again, "answers came again, the last counts"), (n_unknown, "answers are to no question")):
        if count:
            print(f"  warning: {count} {what}", file=sys.stderr)
