"""Writes one page with the questions whose answer changes by pruning.

    python -m analysis.answers results/llava15_7b/folder/*/*
    python -m analysis.answers CELL ... --every --samples 200 --out answers.html

Each argument is the folder of a finished cell. All cells must have the same model and data. The page shows the image,
the kept tokens in each cell, and every answer, marked if it differs from the answer with all tokens. It needs no
network. Questions without a right answer are shown too.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import compare, gallery, load, masks
from analysis.command import arguments
from experiments import build, conf
from experiments.benchmarks.base import Benchmark, BenchmarkError, SampleError
from experiments.explorer import panels

LARGE = """
@media (min-width: 601px) { .panels .cells { grid-template-columns: 240px minmax(0, 1fr) } }
.panels .others { grid-template-columns: minmax(0, 1fr) }
.panels .line { max-width: calc(var(--budgets) * 250px) }
"""
MOST = 200
"""Number of questions in a table of the report."""


@dataclass(frozen=True)
class Column:
    """A finished cell, one column of the page.

    Attributes
    ----------
    label : str
        Method and budget, and the folder if another cell has the same method and budget.
    record : dict
    rows : dict
        Lines of samples.jsonl by sample id.
    """

    label: str
    record: dict[str, Any]
    rows: dict[str, dict[str, Any]]

    @property
    def method(self) -> str:
        return self.record["cell"]["pruner"]

    @property
    def keep(self) -> str:
        return str(self.record["cell"]["keep"])


def read_columns(paths: Sequence[Path]) -> list[Column]:
    """The cells, sorted: all tokens first, then by method and budget.

    Raises
    ------
    ValueError
        If a folder is not a finished cell, or the cells do not have the same model and dataset.
    """
    read = [(path, *masks.read_cell(path)) for path in paths]

    def place(entry: tuple[Path, dict, dict]) -> tuple:
        cell = entry[1]["cell"]
        return compare.place(cell["pruner"]), -float(cell["keep"]) if cell["keep"] != "auto" else 1.0

    columns: list[Column] = []
    for path, record, rows in sorted(read, key=place):
        subject = {key: record["cell"][key] for key in ("model", "dataset")}
        first = columns[0].record if columns else record
        if subject != {key: first["cell"][key] for key in subject}:
            raise ValueError(f"{path} is of {' and '.join(subject.values())}: give cells of one model and data set")
        if digest(record) != digest(first):
            raise ValueError(f"{path} answers another version of the data: run the older cells again")
        label = name_of(record)
        label += f" {path.name}" if label in [column.label for column in columns] else ""
        columns.append(Column(label, record, rows))
    return columns


def digest(record: dict[str, Any]) -> str | None:
    """Digest of the data; None if code generates them."""
    return record["config"].get("dataset", {}).get("digest")


def name_of(record: dict[str, Any]) -> str:
    method = record["cell"]["pruner"]
    if method == "none":
        return "all tokens"
    return f"{compare.METHODS.get(method, method)}, {compare.budget_name(str(record['cell']['keep']))}"


def is_changed(column: Column, full: Column, sample: str) -> bool:
    """Whether the cell's answer differs from that of ``full``, ignoring blanks and case."""
    said = [str(one.rows[sample]["prediction"]).strip().lower() for one in (column, full)]
    return said[0] != said[1]


def shared_samples(columns: Sequence[Column]) -> list[str]:
    return [sample for sample in columns[0].rows if all(sample in column.rows for column in columns)]


def changed_first(columns: Sequence[Column]) -> list[str]:
    """Samples whose answer differs from the first cell in any cell, sorted by the number of such cells."""
    counts = {
        sample: sum(is_changed(column, columns[0], sample) for column in columns[1:])
        for sample in shared_samples(columns)
    }
    return sorted((sample for sample in counts if counts[sample]), key=lambda sample: -counts[sample])


# ------------------------------------------------------------------------------------------------------- side by side


def answer_html(column: Column, full: Column, sample: str) -> str:
    row = column.rows[sample]
    said = html.escape(row["prediction"] or panels.NOTHING) if "error" not in row else "<i>failed</i>"
    mark = "" if row["correct"] is None else " ✓" if masks.is_right(row) else " ✗"
    changed = " class=changed-answer" if column is not full and is_changed(column, full, sample) else ""
    return f"<td{changed}>{said}{mark}</td>"


def side_by_side(columns: Sequence[Column], samples: Sequence[str]) -> str:
    """Table of samples: question and image, then the answer of each cell."""
    heads = "".join(f"<th>{html.escape(column.label)}</th>" for column in columns)
    lines = [f"<div class=scroll><table class=side><thead><tr><th>question<th>image{heads}</tr></thead>"]
    for sample in samples:
        row = columns[0].rows[sample]
        told = "".join(answer_html(column, columns[0], sample) for column in columns)
        lines.append(f"<tr><td>{html.escape(row['question'])}</td><td>{html.escape(str(row['image_id']))}</td>{told}")
    return "\n".join([*lines, "</table></div>"])


def unscored_html(cells: pd.DataFrame) -> str:
    """Part of the report: answers side by side, for each model and dataset without right answers."""
    blocks = []
    if cells.empty or "path" not in cells:
        return ""
    for (model, dataset), group in cells[cells.dataset != load.EFFICIENCY].groupby(["model", "dataset"], sort=False):
        unscored = [cell.path for cell in group.itertuples() if not cell.scored and pd.notna(cell.n_visual)]
        if not unscored:
            continue
        try:
            columns = read_columns(unscored)
        except ValueError as error:
            blocks.append(f"<p class=small>{html.escape(str(error))}</p>")
            continue
        samples = shared_samples(columns)
        title = html.escape(f"{conf.title('model', model)}, {dataset}: {len(samples)} questions")
        rest = f"<p class=small>The first {MOST}.</p>" if len(samples) > MOST else ""
        table = side_by_side(columns, samples[:MOST])
        blocks.append(f"<details open><summary>{title}</summary>{summary(columns)}{table}{rest}</details>")
    return "\n".join(blocks)


def summary(columns: Sequence[Column]) -> str:
    """One line per cell: its first metric, and the number of answers that differ from the first cell."""
    samples, lines = shared_samples(columns), []
    for column in columns:
        metric = next(iter(column.record["metrics"].items()), None)
        scored = f"{metric[0]} {metric[1]:.2f}" if metric else "not scored"
        changed = sum(is_changed(column, columns[0], sample) for sample in samples)
        share = f"{changed} of {len(samples)} answers changed" if column is not columns[0] else ""
        unusable = ", ".join(f"{n} {kind}" for kind, n in column.record.get("unusable", {}).items() if n)
        cells = (column.label, scored, share, unusable)
        lines.append(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in cells)}</tr>")
    return f"<table class=side>{''.join(lines)}</table>"


# ------------------------------------------------------------------------------------------------------- with masks


def page(columns: Sequence[Column], benchmark: Benchmark, samples: Sequence[str], what: str) -> str:
    """HTML of the page. Samples without an image on this machine are left out."""
    views, images = [], {}
    for sample in samples:
        name = columns[0].rows[sample]["image_id"]
        try:
            images[name] = benchmark.images(name)[0].convert("RGB")
        except SampleError:
            continue
        runs = [(column.method, column.keep, column.rows[sample]) for column in columns]
        views.append(gallery.show(name, images[name], runs))
    articles = [
        f"<article class=case><p class=small>{html.escape(view['src'])}</p><div class=panels></div></article>"
        for view in views
    ]
    title = html.escape("Answers of " + " ".join(columns[0].record["cell"][key] for key in ("model", "dataset")))
    head = f"""<header><h1>{title}</h1>
{summary(columns)}
<p>{html.escape(what)} Faded patches were dropped. ≠ marks an answer that is not that of all tokens.</p></header>"""
    every = (
        f"<details><summary>All answers side by side</summary>{side_by_side(columns, shared_samples(columns)[:MOST])}"
    )
    return gallery.page(title, head, "".join(articles) + f"{every}</details>", gallery.data(images, views), LARGE)


def main() -> None:
    parser = arguments(__doc__, out="answers.html")
    parser.add_argument("cells", nargs="+", type=Path, metavar="CELL", help="folder of a finished cell")
    parser.add_argument("--every", action="store_true", help="also the questions that all cells answer alike")
    parser.add_argument("--samples", type=int, default=50, help="questions with masks, at most (default: 50)")
    args = parser.parse_args()
    try:
        columns = read_columns(args.cells)
        changed, every = changed_first(columns), shared_samples(columns)
        what = f"{len(changed)} of {len(every)} questions are answered differently by some cell."
        samples = changed + [one for one in every if args.every and one not in set(changed)]
        text = page(columns, build.benchmark(columns[0].record["config"]), samples[: args.samples], what)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    except (ValueError, OSError, BenchmarkError, SampleError) as error:
        parser.exit(2, f"{error}\n")
    print(f"{what}\n{args.out}")


if __name__ == "__main__":
    main()
