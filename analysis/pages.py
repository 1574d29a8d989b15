"""Writes the generated parts of README.md and docs: tables from records, and docs/tree.md from the files.

    python -m analysis.pages                   every part
    python -m analysis.pages tree methods      these parts
    python -m analysis.pages --check           exit with status 1 if the tree is out of date; write nothing

A generated part is between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. If records are missing, they are listed
and the page is not changed. The purpose of a file in the tree is the first line of its docstring, or of the comment at
its top.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from analysis import load, methods, speedup
from analysis.command import arguments
from analysis.compare import METHODS
from analysis.methods import BUDGETS
from experiments.tabular import Table
from experiments.tasks import overhead
from mipruner.pruners import OWN, PRUNERS, ImagePruner

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "demo": "README.md",
    "methods": "docs/methods.md",
    "tree": "docs/tree.md",
    "overhead": "docs/anywhere.md",
    "peers": "docs/speed.md",
    "speedup": "docs/speed.md",
}
"""Page of each generated part."""

SHOWN = ("run.py", "conf", "mipruner", "experiments", "analysis", "plugins", "notebooks", "docs", "tests")


def replace(text: str, name: str, part: str) -> str:
    """Replace the generated part ``name`` of ``text``.

    Raises
    ------
    ValueError
        If the text has no such part.
    """
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the page has no part {name!r}: put {begin.strip()} and {end} where it should stand")
    return re.sub(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: begin + part.strip() + "\n" + end, text, flags=re.S
    )


def purpose(path: Path) -> str:
    """Purpose of a file, from its first line."""
    if path.suffix == ".py":
        module = ast.parse(path.read_text(encoding="utf-8"))
        first = (ast.get_docstring(module) or "").split("\n\n")[0].splitlines()
        if not first:
            classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
            first = (ast.get_docstring(classes[-1]) or "").splitlines() if classes else []
        return first[0] if first else ""
    if path.suffix == ".yaml":
        head = path.read_text(encoding="utf-8").splitlines()[0]
        return head.lstrip("# ") if head.startswith("#") and "@package" not in head else ""
    return ""


def tree(files: list[str]) -> str:
    """Tree of the repository: one line per file with its purpose, one line per folder of configs or data."""
    lines, folders = [], set()
    for name in sorted(files, key=lambda f: (SHOWN.index(f.split("/")[0]), f.count("/") > 0, f)):
        path = Path(name)
        for depth, folder in enumerate(list(path.parents)[::-1][1:]):
            if folder in folders:
                continue
            folders.add(folder)
            inside = sorted(Path(f).stem for f in files if Path(f).parent == folder and f.endswith(".yaml"))
            listed = " ".join(inside) if folder.parts[0] == "conf" and depth else ""
            lines.append((f"{'  ' * depth}{folder.name}/", listed))
        if path.suffix == ".py" and path.name != "__init__.py":
            lines.append((f"{'  ' * (len(path.parts) - 1)}{path.name}", purpose(ROOT / path)))
    width = max(len(left) for left, _ in lines) + 2
    return "```\n" + "\n".join(f"{left:<{width}}{right}".rstrip() for left, right in lines) + "\n```"


def tracked() -> list[str]:
    names = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout
    return [name for name in names.splitlines() if name.split("/")[0] in SHOWN and not name.startswith("tests/data")]


def demo_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells of the demo LLaVA on all crowded scenes, with default settings."""
    if cells.empty or cells[(cells.model == "demo_llava") & (cells.dataset == "demo")].empty:
        raise ValueError("there are no records of the demo: python run.py -m experiment=demo")
    found = cells[(cells.model == "demo_llava") & (cells.dataset == "demo") & (cells.differs.map(len) == 0)]
    return found[found.n_samples == found.n_samples.max()]


def check_complete(cells: pd.DataFrame, names: Iterable[str]) -> None:
    """Raise ValueError with the missing records, unless every method has a record at every budget."""
    there = set(zip(cells.method, cells.keep, strict=True))
    missing = [f"{name} keep={keep}" for name in names for keep in BUDGETS if (name, keep) not in there]
    if missing:
        raise ValueError(f"no record of {', '.join(missing)}: python run.py -m experiment=demo_table1")


def demo_table(cells: pd.DataFrame) -> str:
    """Accuracy of the paper's own pruners by budget, in percent, with the standard error over questions."""
    full = cells[cells.method == "none"].iloc[0]
    n = int(full.n_samples)
    names = [name for name in METHODS if name in OWN and name in set(cells.method)]
    rows = [[METHODS[name], *scores] for name, scores in methods.accuracies(cells, names).items()]
    table = Table(["kept of 576", *BUDGETS], rows).markdown()
    error = full.standard_errors["accuracy"]
    return (
        f"{table}\n\nAccuracy in percent on {n} questions; all tokens: {full.metrics['accuracy']:.1f} "
        f"(standard error {error:.1f}). Commit {full.git_commit[:9]}, {full.device}, "
        f"{full.finished[:10]}: `python run.py -m experiment=demo`."
    )


def overhead_tables() -> str:
    """A table for each record of task=overhead in docs/results, with its command."""
    found = sorted((ROOT / "docs/results").glob("overhead_*.json"))
    if not found:
        raise ValueError(
            "there is no docs/results/overhead_*.json: python run.py task=overhead out=docs/results/overhead_NAME.json"
        )
    lines = []
    for record in (json.loads(path.read_text(encoding="utf-8")) for path in found):
        machine, torch = record["machine"], record["versions"]["torch"]
        said = f"{machine.get('cpu', '')}, {machine['device']}, torch {torch}, commit {record['git_commit'][:9]}"
        lines += [overhead.show(record), f"{said}, {record['date'][:10]}: `{record['command']}`"]
    return "\n\n".join(lines)


def part(name: str, results: Path) -> str:
    """Text of a generated part. Raises ValueError if a record is missing."""
    if name == "tree":
        return tree(tracked())
    if name == "speedup":
        return speedup.table()
    if name == "overhead":
        return overhead_tables()
    if name == "peers":
        found = ROOT / "docs/results/peers_cpu.md"
        if not found.is_file():
            raise ValueError(
                "there is no docs/results/peers_cpu.md: python run.py task=peers out=docs/results/peers_cpu"
            )
        return found.read_text(encoding="utf-8")
    cells = demo_cells(load.cells(results))
    sized = [name for name, cls in PRUNERS.items() if name != "none" and not issubclass(cls, ImagePruner)]
    check_complete(cells, OWN if name == "demo" else sized)  # LLaVA takes images of one size
    return demo_table(cells) if name == "demo" else methods.table(cells)


def main() -> None:
    parser = arguments(__doc__, reads_results=True)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PAGES)}; all of them by default")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the tree is out of date")
    args = parser.parse_args()
    if unknown := set(args.parts) - PAGES.keys():
        parser.error(f"unknown part {unknown.pop()!r}: choose {', '.join(PAGES)}")
    for name in ["tree"] if args.check else args.parts or PAGES:
        page = ROOT / PAGES[name]
        text = page.read_text(encoding="utf-8")
        try:
            new = replace(text, name, part(name, args.results))
        except ValueError as error:
            parser.exit(2, f"{PAGES[name]} keeps its part {name}: {error}\n")
        if args.check:
            sys.exit(None if new == text else f"{PAGES[name]} is out of date: python -m analysis.pages {name}")
        page.write_text(new, encoding="utf-8")
        print(PAGES[name], name)


if __name__ == "__main__":
    main()
