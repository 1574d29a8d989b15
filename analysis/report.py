"""Writes all measured results as one HTML page: tables, figures, and samples on which methods disagree.

    python -m analysis.report                                       from results/ into docs/results/report.html
    python -m analysis.report --results results --out report.html --samples 6

The page needs no server and no network: it contains images and plots. Masks are drawn as in the explorer.
"""

import base64
import hashlib
import html
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from PIL import Image

from analysis import answers, compare, figures, gallery, load, masks, tables
from analysis.command import arguments
from experiments import build, conf
from experiments.benchmarks.base import BenchmarkError, SampleError

TITLE = "MI-Pruner: what was measured"


# --------------------------------------------------------------------------------------------------------------- tables


def layout_html(layout: tables.Layout) -> str:
    """A table with its footnotes and the commands for missing numbers."""
    lines = [f"<div class=scroll>{layout.table.html()}</div>"]
    lines.append(f"<p class=small>{html.escape(' '.join(layout.remarks))}</p>")
    if layout.footnotes:
        notes = "".join(f"<li><sup>{mark}</sup> {html.escape(text)}</li>" for mark, text in layout.footnotes.items())
        lines.append(f"<ul class='small notes'>{notes}</ul>")
    if layout.commands:
        commands = html.escape("\n".join(layout.commands))
        lines.append(f"<details><summary>Not run yet: the commands</summary><pre>{commands}</pre></details>")
    return "\n".join(lines)


def tables_html(cells: pd.DataFrame) -> str:
    """All tables: measured ones first and open, the others closed."""
    measured: list[str] = []
    printed: list[str] = []
    for name in compare.table_names():
        compared = compare.compare(compare.wanted(name), cells)
        done = (compared.n_seeds > 0).sum()
        layout = tables.lay_out(compared)
        title = f"{html.escape(layout.title)} <span class=small>{done} of {len(compared)} numbers</span>"
        state = " open" if done > len(compared) / 2 else ""
        block = f"<details id={name}{state}><summary>{title}</summary>{layout_html(layout)}</details>"
        (measured if done else printed).append(block)
    return "\n".join([*measured, *printed])


# -------------------------------------------------------------------------------------------------------------- figures


def figures_html(cells: pd.DataFrame) -> str:
    """All figures with measured numbers."""
    blocks = []
    for name in figures.FIGURES:
        figure = figures.draw_figure(name, cells)
        if figure is None:
            continue
        vector = io.BytesIO()
        with plt.rc_context(figures.STYLE | {"svg.fonttype": "path", "svg.hashsalt": name}):
            figure.savefig(vector, format="svg", metadata={"Date": None})
        plt.close(figure)
        kind, source = figures.FIGURES[name]
        caption = html.escape(f"{conf.experiment_title(source)}: {(kind.__doc__ or '').splitlines()[0]}")
        blocks.append(
            f"<figure><img src='{data_url(vector.getvalue(), 'image/svg+xml')}' alt='{caption}'>"
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "\n".join(blocks) or "<p>Nothing has been measured yet.</p>"


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# -------------------------------------------------------------------------------------------------------------- gallery


@dataclass(frozen=True)
class Case:
    """A question on which methods disagree, with kept tokens and answers of each method."""

    model: str
    dataset: str
    keep: str
    image: Image.Image
    rows: dict[str, dict[str, Any]]
    """Lines of samples.jsonl by method."""


def cases(cells: pd.DataFrame, n_samples: int) -> Iterator[Case]:
    """The ``n_samples`` questions, per model, dataset and budget, on which the methods disagree most.

    Questions without an image on this machine are skipped.
    """
    if cells.empty:
        return
    default = cells[(cells.differs.map(len) == 0) & (cells.dataset != load.EFFICIENCY)]
    default = default[default.n_visual.notna()]  # a server does not tell what it kept
    for (model, dataset), group in default.groupby(["model", "dataset"], sort=False):
        every = {cell.method: cell.path for cell in group[group.method == "none"].itertuples()}
        for keep, budget in group[group.method != "none"].groupby("keep", sort=False):
            order = sorted(budget.itertuples(), key=lambda cell: (compare.place(cell.method), -cell.seed))
            paths = every | {cell.method: cell.path for cell in order}
            answered = {method: masks.read_cell(path)[1] for method, path in paths.items()}
            pruned = [rows for method, rows in answered.items() if method != "none"]
            for sample in masks.disagreements(pruned, n_samples):
                rows = {method: rows[sample] for method, rows in answered.items() if sample in rows}
                try:
                    image = build.benchmark(group.iloc[0].config).images(next(iter(rows.values()))["image_id"])[0]
                except SampleError:
                    continue
                except BenchmarkError as error:
                    print(f"{group.iloc[0].path} is not drawn: {error}", file=sys.stderr)
                    break
                yield Case(model, dataset, keep, image.convert("RGB"), rows)


def image_key(image: Image.Image) -> str:
    """Key of an image, so that the page has each image once."""
    return f"p{hashlib.sha256(image.tobytes()).hexdigest()[:12]}"


def case_html(case: Case) -> str:
    """Heading and placeholder of a case. The script draws its panels there when it becomes visible."""
    first = next(iter(case.rows.values()))
    group = html.escape(f"{conf.title('model', case.model)}, {case.dataset}, {compare.budget_name(case.keep)}")
    task = html.escape(first["task"])
    return (
        f"<article class=case data-group='{group}' data-task='{task}'>"
        f"<p class=small>{group} tokens, {task}, sample {html.escape(str(first['id']))}</p><div class=panels></div>"
        "</article>"
    )


def gallery_data(found: Sequence[Case]) -> str:
    """The cases as JSON, with each image once."""
    images = {image_key(case.image): case.image for case in found}
    views = [
        gallery.show(image_key(case.image), case.image, [(name, case.keep, row) for name, row in case.rows.items()])
        for case in found
    ]
    return gallery.data(images, views)


# ----------------------------------------------------------------------------------------------------------------- page


def page(cells: pd.DataFrame, n_samples: int) -> str:
    """HTML of the page."""
    found = list(cases(cells, n_samples))
    articles = "\n".join(map(case_html, found))
    unscored = answers.unscored_html(cells)
    sources = "Nothing has been measured yet."
    if len(cells):
        devices = "; ".join(sorted(set(cells.device)))
        commits = ", ".join(sorted({(commit or "no repository")[:9] for commit in cells.git_commit}))
        sources = f"{len(cells)} result records, {devices}; code {commits}."
    head = f"""<header><h1>{TITLE}</h1>
<p>{html.escape(sources)} Numbers of the demo models come from small models on rendered scenes; they are no evidence
about photographs.</p></header>
<nav><div><a href=#tables>Tables</a> <a href=#figures>Figures</a> <a href=#gallery>Gallery</a>{
        unscored and " <a href=#answers>Answers</a>"
    }</div></nav>"""
    main = f"""<h2 id=tables>Tables</h2>
{tables_html(cells)}
<h2 id=figures>Figures</h2>
<div class=plots>{figures_html(cells)}</div>
<h2 id=gallery>Where methods disagree</h2>
<p>The questions of each budget on which the methods differ most. Faded patches were dropped, in the language model too
where a method prunes there: what is seen is what reached its last layer. This is a selection of
hard cases, not a sample: the tables have the rates.</p>
<div class=filters><label>Cells <select name=group><option value="">all</option></select></label>
<label>Task <select name=task><option value="">all</option></select></label></div>
{articles or "<p>No two methods have been run on the same questions.</p>"}
{unscored and f"<h2 id=answers>Answers to questions without a right one</h2>{unscored}"}"""
    return gallery.page(TITLE, head, main, gallery_data(found))


def main() -> None:
    parser = arguments(__doc__, "docs/results/report.html", reads_results=True)
    parser.add_argument(
        "--samples", type=int, default=6, help="questions shown per model, dataset and budget (default: 6)"
    )
    args = parser.parse_args()
    try:
        text = page(load.cells(args.results), args.samples)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
