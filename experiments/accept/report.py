"""Acceptance report: lines with expected and found values, saved as JSON and Markdown after each section."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.benchmarks.base import BenchmarkError
from experiments.results import write_atomic, write_record
from experiments.tabular import Cell, Span, Table
from mipruner.errors import InputError, ModelError

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"


@dataclass(frozen=True)
class Line:
    """Result of one check.

    Attributes
    ----------
    name : str
    status : "pass", "fail" or "not run"
    expected, found : str
        Values as text. If the check did not run, ``found`` is the reason.
    tolerance : str
        Difference that passes; empty if values must be equal.
    source : str
        Source of the expected value.
    """

    name: str
    status: str
    expected: str
    found: str
    tolerance: str = ""
    source: str = ""


def check(name: str, passed: bool, expected: Any, found: Any, tolerance: str = "", source: str = "") -> Line:
    """A line that passes or fails."""
    return Line(name, PASS if passed else FAIL, str(expected), str(found), tolerance, source)


def not_run(name: str, reason: str, expected: str = "", source: str = "") -> Line:
    return Line(name, NOT_RUN, expected, reason, source=source)


class Report:
    """Lines of one acceptance by section, in ``folder``/report.json and report.md.

    A stored section without a failed line is not run again, so an interrupted acceptance resumes.

    Parameters
    ----------
    folder : Path
    head : dict
        Facts of the acceptance: command, model, versions, device, commit. A stored report with another ``identity`` in
        its head is discarded.
    """

    def __init__(self, folder: Path, head: dict[str, Any]):
        self.folder, self.head = folder, head
        self.sections: dict[str, list[Line]] = {}
        self.seconds: dict[str, float] = {}
        path = folder / "report.json"
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["head"]["identity"] == head["identity"]:
                sections = {name: [Line(**line) for line in lines] for name, lines in stored["sections"].items()}
                self.sections = {
                    name: lines for name, lines in sections.items() if all(line.status != FAIL for line in lines)
                }
                self.seconds = stored["seconds"]

    @property
    def lines(self) -> list[Line]:
        return [line for lines in self.sections.values() for line in lines]

    @property
    def failed(self) -> list[Line]:
        return [line for line in self.lines if line.status == FAIL]

    def run(self, section: str, checks: Callable[[], Iterable[Line]]) -> Iterator[Line]:
        """Run the checks of a section, unless they are stored. An exception becomes a failed line."""
        if section in self.sections:
            yield from self.sections[section]
            return
        started, lines = time.perf_counter(), []
        try:
            for line in checks():
                lines.append(line)
                yield line
        except (InputError, ModelError, BenchmarkError) as error:
            lines.append(Line(f"{section} could be checked", FAIL, "no error", str(error)))
            yield lines[-1]
        except (
            Exception
        ) as error:  # the report shows every error, and an error in one section does not hide the other sections
            lines.append(Line(f"{section} could be checked", FAIL, "no error", f"{type(error).__name__}: {error}"))
            yield lines[-1]
        self.sections[section] = lines
        self.seconds[section] = round(time.perf_counter() - started, 1)
        self.save()

    def save(self) -> None:
        stored = {
            "head": self.head,
            "verdict": self.verdict,
            "seconds": self.seconds,
            "sections": {name: [asdict(line) for line in lines] for name, lines in self.sections.items()},
        }
        write_record(self.folder / "report.json", stored)
        write_atomic(self.folder / "report.md", self.markdown())

    @property
    def verdict(self) -> str:
        counts = {status: sum(line.status == status for line in self.lines) for status in (PASS, FAIL, NOT_RUN)}
        return f"{counts[PASS]} passed, {counts[FAIL]} failed, {counts[NOT_RUN]} not run"

    def markdown(self) -> str:
        head = [f"- {name}: {value}" for name, value in self.head.items() if name != "identity"]
        blocks = [f"# Acceptance of {self.head['model']}: {self.verdict}", "\n".join(head)]
        for section, lines in self.sections.items():
            rows: list[Sequence[Cell]] = [
                [line.name, Span(line.status, "bold"), line.expected, line.found, line.tolerance, line.source]
                for line in lines
            ]
            table = Table(["check", "result", "expected", "found", "tolerance", "source"], rows, n_text=6)
            blocks += [f"## {section} ({self.seconds.get(section, 0):.1f} s)", table.markdown()]
        return "\n\n".join(blocks) + "\n"
