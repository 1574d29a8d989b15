"""Reads and checks the rows of a benchmark's file before a model is loaded."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

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

    @model_validator(mode="before")
    @classmethod
    def check_cells(cls, row: Any) -> Any:
        if not isinstance(row, dict):
            raise ValueError(f"it is {ascii(row)[:60]}, not columns with values")
        if None in row:  # csv.DictReader puts further cells there
            raise ValueError("it has more cells than columns: put a text with commas in quotes")
        return row


AnyRow = TypeVar("AnyRow", bound=Row)
In = TypeVar("In")
Out = TypeVar("Out")


def read_rows(file: Path) -> list[Any]:
    """Rows of a .parquet, .csv, .jsonl or .json file (a list or an object of rows); UTF-8 with or without a BOM.

    The cells of a .csv file are separated by commas, semicolons or tabs.

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
            separator = max(",;\t", key=text.partition("\n")[0].count)
            return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True))
        if file.suffix.lower() == ".jsonl":  # only \n ends a line: a text may contain other line separators
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        rows = json.loads(text)
    except UnicodeDecodeError:
        raise BenchmarkError(f"{file} is not UTF-8: save it as UTF-8") from None
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
    """The valid rows with their numbers from 0, and error messages of the others, see `read_each`."""
    good, bad = read_each(enumerate(rows), lambda _, row: schema.model_validate(row), where, on_bad_row)
    if not good:
        raise BenchmarkError(f"{where} has no rows")
    return good, bad


def read_each(
    rows: Iterable[tuple[int, In]], read: Callable[[int, In], Out], where: str, on_bad_row: str
) -> tuple[list[tuple[int, Out]], list[str]]:
    """What ``read`` makes of each numbered row, and error messages of the rows for which it raises ValueError.

    Raises
    ------
    BenchmarkError
        At the first bad row, unless ``on_bad_row`` is skip; or if no row is valid.
    """
    good, bad = [], []
    for number, row in rows:
        try:
            good.append((number, read(number, row)))
        except ValueError as error:
            bad.append(f"row {number + 1} of {where}: {_words(error)}")
            if on_bad_row == "stop":
                raise BenchmarkError(f"{bad[0]}. Correct it, or set dataset.on_bad_row=skip") from error
    if bad and not good:
        raise BenchmarkError(f"{where} has no good row; {bad[0]}")
    return good, bad


class Unique:
    """Checks that no two rows have the same id."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}

    def check(self, name: str, number: int) -> None:
        if (first := self._rows.setdefault(name, number)) != number:
            raise ValueError(f"its id {name!r} is that of row {first + 1}")


def _words(error: ValueError) -> str:
    """The first error, with its field and value."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    said = first["msg"].removeprefix("Value error, ").replace(" after validation", "")
    if not field:
        return said
    if first["type"] == "missing":
        return f"{field} is missing; it has {', '.join(map(str, first['input'])) or 'nothing'}"
    found = "null" if first["input"] is None else ascii(first["input"])[:60]
    return f"{field} is {found}: {said[0].lower()}{said[1:]}"
