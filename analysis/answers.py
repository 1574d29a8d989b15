"""Writes one page with the questions whose answer changes by pruning.

    python -m analysis.answers results/llava15_7b/folder/*/*
    python -m analysis.answers CELL ... --every --samples 200 --out answers.html

Each argument is the folder of a finished cell. All cells must have the same model and data. The page shows the image,
the kept tokens in each cell, and every answer, marked if it differs from the answer with all tokens. It needs no
network. Questions without a right answer are shown too.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import compare, load, masks
from analysis.command import arguments
from analysis.gallery import SCRIPT, STYLE
from experiments import build, conf
from experiments.benchmarks.base import Benchmark, BenchmarkError, SampleError
from experiments.explorer import panels

WIDTH = 448
"""Largest width of images in the page, in pixels; larger images are resized."""
LARGE = """
@media (min-width: 601px) { .panels .cells { grid-template-columns: 240px minmax(0, 1fr) } }
.panels .others { grid-template-columns: minmax(0, 1fr) }
.panels .line { max-width: calc(var(--budgets) * 250px) }
"""
"""Number of questions with masks in the page."""
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
    known = list(compare.METHODS)

    def place(entry: tuple[Path, dict, dict]) -> tuple:
        cell = entry[1]["cell"]
        method = known.index(cell["pruner"]) if cell["pruner"] in known else len(known)
        return method, cell["pruner"], -float(cell["keep"]) if cell["keep"] != "auto" else 1.0

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


def views(columns: Sequence[Column], benchmark: Benchmark, samples: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Data for `panels.js` of each sample, with its first image as ``image``."""
    for sample in samples:
        first = columns[0].rows[sample]
        answered = [column for column in columns if "error" not in column.rows[sample]]
        try:
            image = benchmark.images(first["image_id"])[0].convert("RGB")
        except SampleError:
            continue
        runs = [show_run(column, sample) for column in columns]
        expected = None if first["answer"] is None else masks.answer_text(first["answer"])
        question = {"question": first["question"], "expected": expected, "words": [], "pmi": None, "runs": runs}
        grid, box = (answered[0].rows[sample][key][0] for key in ("grids", "boxes")) if answered else (None, None)
        where = {"src": first["image_id"], "image": image, "size": image.size, "grid": grid, "box": box}
        yield where | {"vocabulary": None, "questions": [question]}


def show_run(column: Column, sample: str) -> dict[str, Any]:
    row = column.rows[sample]
    label = compare.METHODS.get(column.method, column.method)
    run = {"pruner": column.method, "label": label, "keep": column.keep, "order": None}
    if "error" in row:
        return run | {"error": row["error"]}
    right = None if row["correct"] is None else masks.is_right(row)
    said = {"answer": row["prediction"], "right": right, "kept": row["kept"][0], "n_visual": row["n_visual"]}
    return run | said


def page(columns: Sequence[Column], benchmark: Benchmark, samples: Sequence[str], what: str) -> str:
    """HTML of the page."""
    shown, images, articles = [], {}, []
    for view in views(columns, benchmark, samples):
        image = view.pop("image")
        if view["src"] not in images:
            images[view["src"]] = panels.data_url(image, WIDTH)
        shown.append(view)
        articles.append(f"<article class=case><p class=small>{html.escape(view['src'])}</p><div class=panels></div>")
    title = html.escape(" ".join(columns[0].record["cell"][key] for key in ("model", "dataset")))
    return f"""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="{panels.POLICY}">
<meta name=viewport content="width=device-width, initial-scale=1">
<title>Answers of {title}</title>
<style>{panels.style()}{STYLE}{LARGE}</style>
<header><h1>Answers of {title}</h1>
{summary(columns)}
<p>{html.escape(what)} Faded patches were dropped. ≠ marks an answer that is not that of all tokens.</p></header>
<main>
{"</article>".join([*articles, ""])}
<details><summary>All answers side by side</summary>{side_by_side(columns, shared_samples(columns)[:MOST])}</details>
</main>
<script type=application/json id=cases>{panels.embedded({"images": images, "views": shown})}</script>
<script>{panels.script()}{SCRIPT}</script>
</html>
"""


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
