"""Reads and checks the rows of a benchmark's file before a model is loaded."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from experiments.benchmarks.base import BenchmarkError


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_not_blank)]
YesNo = Annotated[Literal["yes", "no"], BeforeValidator(_lower)]


class Row(BaseModel):
    """Columns of a file with their types. A number is converted to text if text is expected."""

    model_config = ConfigDict(coerce_numbers_to_str=True, extra="ignore")


AnyRow = TypeVar("AnyRow", bound=Row)


def read_rows(file: Path) -> list[Any]:
    """Rows of a .parquet, .csv, .jsonl or .json file (a list or an object of rows); UTF-8 with or without a BOM.

    Raises
    ------
    BenchmarkError
        If the file is missing or cannot be read.
    """
    try:
        if file.suffix.lower() == ".parquet":
            return pq.read_table(file).to_pylist()
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        if file.suffix.lower() == ".jsonl":  # only \n ends a line: a text may contain other line separators
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        rows = json.loads(text)
    except (OSError, ValueError, csv.Error) as error:
        raise BenchmarkError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()):
        rows = [{"question_id": name} | row for name, row in rows.items()]
    elif isinstance(rows, dict) and len(rows) == 1:
        (rows,) = rows.values()
    if not isinstance(rows, list):
        raise BenchmarkError(f"{file} is no list of rows")
    return rows


def check_on_bad_row(on_bad_row: str) -> str:
    """Return ``on_bad_row`` or raise ValueError naming the valid ones."""
    if on_bad_row not in ("stop", "skip"):
        raise ValueError(f"on_bad_row={on_bad_row!r} is not one of stop, skip")
    return on_bad_row


def check_rows(
    rows: Iterable[dict[str, Any]], schema: type[AnyRow], where: str, on_bad_row: str
) -> tuple[list[tuple[int, AnyRow]], list[str]]:
    """The valid rows with their numbers from 0, and error messages of the others.

    Raises
    ------
    BenchmarkError
        At the first bad row, unless ``on_bad_row`` is skip; or if no row is valid.
    """
    good, bad = [], []
    for number, row in enumerate(rows):
        try:
            good.append((number, schema.model_validate(row)))
        except ValidationError as error:
            bad.append(f"row {number + 1} of {where}: {_words(error)}")
            if on_bad_row == "stop":
                raise BenchmarkError(f"{bad[0]}. Correct it, or set dataset.on_bad_row=skip") from error
    if bad and not good:
        raise BenchmarkError(f"{where} has no good row; {bad[0]}")
    return good, bad


def _words(error: ValidationError) -> str:
    """The first error, with its field and value."""
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or "the row"
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{field} is missing; it has {', '.join(map(str, first['input'])) or 'nothing'}"
    found = "null" if first["input"] is None else ascii(first["input"])[:60]
    return f"{field} is {found}: {said[0].lower()}{said[1:]}"
