"""Writes the tables of the paper and of the demo, measured beside printed numbers, as Markdown, LaTeX and CSV.

    python -m analysis.tables                                       all of them, from results/ into docs/results/
    python -m analysis.tables --table table1 --results results --out tables

`analysis.compare` finds the numbers, this module arranges them, and `experiments.tabular` writes the table.
"""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import load, paired
from analysis.command import arguments
from analysis.compare import COSTS, METHODS, budget_name, column_name, commands, compare, is_drawn, table_names, wanted
from experiments import conf
from experiments.results import WARN_ABOVE
from experiments.tabular import NEWLINE, TEX, Cell, Span, Table

RANKED = {1: "bold", 2: "underline"}
AGAINST = (
    "Against MI-Pruner: the difference in correct answers at the same budget, in points, paired question by question"
    " over all datasets of the row; ± is its standard error, clustered by image. If MI-Pruner has several rows,"
    " the first of them counts."
)


@dataclass(frozen=True)
class Layout:
    """A compared table as text, with notes below it."""

    name: str
    title: str
    table: Table
    footnotes: dict[str, str]
    remarks: list[str]
    commands: list[str]


def lay_out(table: pd.DataFrame) -> Layout:
    """Layout of a compared table: rows of methods and settings, columns of metrics, headings of models and budgets."""
    table = table.assign(
        row=list(table[["model", "keep", "method", "setting"]].itertuples(index=False, name=None)),
        column=list(table[["dataset", "metric"]].itertuples(index=False, name=None)),
    )
    marks, footnotes = place_footnotes(table)
    columns = list(dict.fromkeys(table.column))
    gains = paired.against(table)
    heads: list[Cell] = [[column_name(*column), Span(marks.get(column, ""), "sup")] for column in columns]
    head: list[Cell] = ["", "tokens", "per layer", *heads, *(["against MI-Pruner"] if gains else [])]
    groups: dict[str, list[list[Cell]]] = {}
    for key, numbers in table.groupby("row", sort=False):
        model, keep, method, setting = key
        title = conf.title("model", model) + ("" if method == "none" else f", keep {budget_name(keep)}")
        label = METHODS.get(method, method) + (f" ({setting})" if setting else "")
        entries: dict[Any, Cell] = {
            number.column: entry(number, marks.get((key, number.column), "")) for number in numbers.itertuples()
        }
        cells: list[Cell] = [[label, Span(marks.get(key, ""), "sup")], span(numbers.n_kept), span(numbers.layer_mean)]
        cells += [entries.get(column, "–") for column in columns]
        cells += ["{:+.1f} ± {:.1f}".format(*gains[key]) if key in gains else ""] if gains else []
        groups.setdefault(title, []).append(cells)
    name = table.table.iloc[0]
    rows: list[str | Sequence[Cell]] = [row for title, group in groups.items() for row in (title, *group)]
    return Layout(
        name,
        conf.experiment_title(name),
        Table(head, rows),
        footnotes,
        remarks(table) + ([AGAINST] if gains else []),
        commands(table),
    )


def place_footnotes(table: pd.DataFrame) -> tuple[dict, dict[str, str]]:
    """Marks by column, row or (row, column), and footnotes by mark.

    A footnote for all numbers of a column or row has one mark, at its head.
    """
    explanations = load.paper_notes()
    counts = table.groupby("dataset").n_samples.transform("max")
    holders: dict[str, set] = {}
    for number, expected in zip(table.itertuples(), counts, strict=True):
        texts = [explanations[note] for note in number.notes]
        if number.n_failed > 0:
            texts.append(f"{number.n_failed:.0f} of {number.n_samples:.0f} samples failed and count as wrong.")
        if number.n_skipped > 0:
            texts.append(f"{number.n_skipped:.0f} rows of the data could not be used and were left out.")
        for kind, count in (("empty", number.n_empty), ("unreadable", number.n_unreadable)):
            if count > WARN_ABOVE * number.n_samples:
                texts.append(f"More than {WARN_ABOVE:.0%} of the answers are {kind}.")
        if number.n_samples < expected:
            texts.append(f"Over {number.n_samples:,.0f} samples only.")
        if is_drawn(number.method, number.setting) and number.n_seeds == 1 and number.metric not in COSTS:
            texts.append("One seed only.")
        for text in texts:
            holders.setdefault(text, set()).add((number.row, number.column))
    everywhere = set(zip(table.row, table.column, strict=True))
    marks: dict = {}
    for mark, where in zip(string.ascii_lowercase, holders.values(), strict=False):
        for head in [*dict.fromkeys(table.column), *dict.fromkeys(table.row)]:
            under = {place for place in everywhere if head in place}
            if len(under) > 1 and under <= where:
                marks[head] = marks.get(head, "") + mark
                where -= under
        for place in where:
            marks[place] = marks.get(place, "") + mark
    return marks, dict(zip(string.ascii_lowercase, holders, strict=False))


def entry(number, marks: str) -> Cell:
    """The measured number, and below it the paper's number and the difference."""

    def text(value: float, sign: str = "") -> str:
        return "" if math.isnan(value) else f"{value:{sign}.{number.digits}f}"

    def error(value: str) -> str:
        return f" ± {value}" if value else ""

    ours = text(number.ours)
    cell = [Span(ours, RANKED.get(number.rank, "")) if ours else "–", Span(error(text(number.error)), "small")]
    if number.printed:
        ranked = f"{RANKED.get(number.printed_rank, '')} small".strip()
        difference = text(number.difference, "+z")
        rest = error(text(number.spread)) + (f" ({difference})" if difference else "")
        cell += [NEWLINE, Span("paper ", "small"), Span(number.printed, ranked), Span(rest, "small")]
    return [*cell, Span(marks, "sup")]


def span(values: pd.Series) -> str:
    """A number of tokens, or its range over the datasets."""
    low, high = values.min(), values.max()
    if math.isnan(low):
        return ""
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g}–{high:.4g}"


def remarks(table: pd.DataFrame) -> list[str]:
    lines = ["Bold is the best and underlined the second best of a budget, among the numbers that are there."]
    if table.printed.any():
        lines.append("Below or after ours: the paper's number, and ours minus it.")
    measured = table[table.n_seeds > 0]
    by_cell = measured.drop_duplicates("cell")
    if by_cell.n_empty.sum() + by_cell.n_unreadable.sum() > 0:
        lines.append(
            f"Of {by_cell.n_samples.sum():,.0f} answers {by_cell.n_empty.sum():,.0f} are empty, and in "
            f"{by_cell.n_unreadable.sum():,.0f} others the rule finds no yes, no or letter."
        )
    if len(measured):
        lines.append(
            "Tokens: the nominal budget. Per layer: visual tokens that enter a layer of the language model, mean over"
            " the layers; methods that prune inside it spend more than the budget: compare them by this number."
        )
    scores = measured[~measured.metric.isin(COSTS)]
    if len(scores):
        counts = scores.groupby("dataset", sort=False).n_samples.max()
        samples = ", ".join(f"{conf.title('dataset', dataset)} {count:,.0f}" for dataset, count in counts.items())
        lines.append("± is the standard error over the samples, or the standard deviation over seeds (Random).")
        lines.append(f"Samples: {samples}.")
    cost = measured[measured.metric.isin(COSTS)]
    if len(cost):
        devices = ", ".join(cost.device.unique())
        lines.append(f"Measured on {devices}, one prompt at a time, median of {cost.n_samples.min():.0f} repetitions.")
        lines.append("± of a latency is half of the range from its 20th to its 80th percentile.")
        if cost.printed.any():
            lines.append("The paper measured on an A100.")
    return lines


# ---------------------------------------------------------------------------------------------------------------- files


def markdown(layout: Layout) -> str:
    lines = [f"### {layout.title}", "", layout.table.markdown(), "", " ".join(layout.remarks), ""]
    lines += [f"<sup>{mark}</sup> {text}  " for mark, text in layout.footnotes.items()]
    if layout.commands:
        lines += ["", "Not run yet:", "", "```bash", *layout.commands, "```"]
    return "\n".join(lines).rstrip() + "\n"


def latex(layout: Layout) -> str:
    """A ``table`` environment, which needs the packages booktabs and graphicx."""
    lines = [
        "% needs \\usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{TEX(layout.title)}. {TEX(' '.join(layout.remarks))}}}",
        rf"\label{{tab:{layout.name.replace('_', '-')}}}",
        r"\resizebox{\linewidth}{!}{%",
        layout.table.latex() + "}",
    ]
    if layout.footnotes:
        notes = [TEX([Span(mark, "sup"), f" {text}"]) for mark, text in layout.footnotes.items()]
        lines += ["", r"\smallskip", rf"\parbox{{\linewidth}}{{\scriptsize {' '.join(notes)}}}"]
    return "\n".join([*lines, r"\end{table}", ""])


def csv(table: pd.DataFrame) -> str:
    """CSV of a compared table: one number per line, with the paired difference of its row to MI-Pruner."""
    gains, rows = (
        paired.against(table),
        table[["model", "keep", "method", "setting"]].itertuples(index=False, name=None),
    )
    against = [gains.get(row, (math.nan, math.nan)) for row in rows]
    table = table.drop(columns=["digits", "value"]).assign(
        notes=table.notes.map(" ".join),
        against_mi=[gain for gain, _ in against],
        against_mi_error=[error for _, error in against],
    )
    return table.rename(columns={"printed": "paper", "spread": "paper_spread"}).to_csv(index=False)


# -------------------------------------------------------------------------------------------------------------- command


def write(names: list[str], results: Path, out: Path) -> list[Path]:
    """Build the tables and write each as NAME.md, NAME.tex and NAME.csv."""
    cells = load.cells(results)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        table = compare(wanted(name), cells)
        layout = lay_out(table)
        for suffix, text in ((".md", markdown(layout)), (".tex", latex(layout)), (".csv", csv(table))):
            written.append(out / f"{name}{suffix}")
            written[-1].write_text(text, encoding="utf-8")
    return written


def main() -> None:
    parser = arguments(__doc__, "docs/results", reads_results=True)
    parser.add_argument("--table", nargs="+", default=table_names(), metavar="NAME", help=", ".join(table_names()))
    args = parser.parse_args()
    try:
        written = write(args.table, args.results, args.out)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
