"""Every table of the paper and of the demo: ours beside the printed number, in Markdown, LaTeX and CSV.

    python -m analysis.tables                                       all of them, from results/ into docs/results/
    python -m analysis.tables --table table1 --results results --out tables

A table is a list of wanted numbers in print order: those of paper.csv, or the product of the values that a file of
conf/experiment sweeps. `compare` looks each of them up in the result records; a number that nobody has measured stays
empty, and the table ends with the commands that measure it. The rest of this file is layout.
"""

import argparse
import itertools
import math
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from analysis import load, paired
from experiments import conf
from experiments.results import parse_method
from mipruner.pruners import PRUNERS

EXPERIMENTS = conf.CONF / "experiment"

METHODS = {name: cls.title for name, cls in PRUNERS.items()}
METRICS = {
    "accuracy": "acc",
    "score": "score",
    "perception": "perception",
    "f1": "F1",
    "yes_rate": "yes",
    "peak_memory_gib": "memory (GiB)",
    "latency_ms": "latency (ms)",
}
DIGITS = {"f1": 2, "yes_rate": 2, "score": 2, "peak_memory_gib": 2}
"""Decimals of a number that the paper does not print; one for the metrics not listed, two for every printed one."""

BETTER = {"latency_ms": "lower", "peak_memory_gib": "lower", "yes_rate": None}
"""Which direction is good, by the metric's name without a split; ``higher`` for those not listed."""

COSTS = ("peak_memory_gib", "latency_ms")
"""What task=efficiency measures, the latency also by stage (``vision_latency_ms``)."""

WANTED = ["table", "model", "keep", "method", "setting", "dataset", "metric"]


# ------------------------------------------------------------------------------------------------------- what is wanted


def wanted(table: str) -> pd.DataFrame:
    """The numbers of one table in print order: the columns of `WANTED`, value, printed, spread and notes.

    Raises
    ------
    ValueError
        If there is neither a table of that name in the paper nor an experiment.
    """
    paper = load.paper()
    if table in set(paper.table):
        return paper[paper.table == table].reset_index(drop=True)
    if not (EXPERIMENTS / f"{table}.yaml").exists():
        raise ValueError(f"there is no table {table!r}: choose from {', '.join(table_names())}")
    return from_experiment(table)


def from_experiment(name: str) -> pd.DataFrame:
    """The numbers that a file of conf/experiment measures, as in `wanted`; nothing is printed beside them."""
    experiment = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    rows = costs(name, experiment) if "methods" in experiment else product(name, sweep(experiment))
    frame = pd.DataFrame(rows, columns=WANTED)
    return frame.assign(value=math.nan, printed="", spread=math.nan, notes=[[] for _ in range(len(frame))])


def table_names() -> list[str]:
    """The paper's tables, then the demo's experiments."""
    return [*load.paper().table.unique(), *sorted(path.stem for path in EXPERIMENTS.glob("demo*.yaml"))]


def sweep(experiment: dict) -> dict[str, list[str]]:
    """What an experiment sweeps, by key of the command line."""
    params = experiment["hydra"]["sweeper"]["params"]
    return {key: [value.strip() for value in str(values).split(",")] for key, values in params.items()}


def costs(table: str, experiment: dict) -> list[tuple]:
    """The numbers that an experiment of task=efficiency measures, as rows of `WANTED`."""
    model, dataset = (
        next(choice[f"override /{group}"] for choice in experiment["defaults"] if f"override /{group}" in choice)
        for group in ("model", "dataset")
    )
    rows = []
    for keep, method in itertools.product(experiment["keeps"], experiment["methods"]):
        name, settings = parse_method(method)
        keep = "1.0" if name == "none" else str(keep)
        setting = ",".join(f"{key}={value}" for key, value in settings.items())
        rows += [(table, model, keep, name, setting, dataset, metric) for metric in COSTS]
    return list(dict.fromkeys(rows))


def product(table: str, swept: dict[str, list[str]]) -> list[tuple]:
    """The numbers that a sweep measures, as rows of `WANTED`. Seeds are one number; all tokens have one budget."""
    named = ("model", "keep", "pruner", "dataset")
    extra = [key for key in swept if key not in (*named, "seed")]
    rows = []
    for model, keep, method, dataset in itertools.product(*(swept[key] for key in named)):
        for values in itertools.product(*(swept[key] for key in extra)):
            setting = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in zip(extra, values, strict=True))
            keep = "1.0" if method == "none" else keep
            metrics = conf.read("dataset", dataset)["shown"]
            rows += [(table, model, keep, method, setting, dataset, metric) for metric in metrics]
    return list(dict.fromkeys(rows))


# ---------------------------------------------------------------------------------------------------- what was measured


def parse_setting(setting: str) -> dict[str, str]:
    """``"lam=1,tau=0.1"`` as a dictionary."""
    return dict(part.split("=", 1) for part in setting.split(",") if part)


def same(a, b) -> bool:
    """Equal as numbers, else as words."""
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return str(a) == str(b)


def satisfies(cell, setting: dict[str, str]) -> bool:
    """Whether a cell has these settings and is default in everything else; ``decoding`` names a file of its group."""
    if "decoding" in setting:
        chosen = yaml.safe_load((conf.CONF / "decoding" / f"{setting['decoding']}.yaml").read_text())
        setting = {key: value for key, value in (setting | chosen).items() if key not in ("decoding", "defaults")}
    return all(same(cell.settings.get(key), value) for key, value in setting.items()) and cell.differs <= set(setting)


def find(cells: list, method: str, keep: str, setting: str = "") -> list:
    """Of the cells of one method those that measured this budget, one per seed.

    Of several that did (with a limit, say) those with the most samples count, and of these the newest.
    """
    measured = [
        cell
        for cell in cells
        if (method == "none" or (same(cell.keep, keep) and ("." in cell.keep) == ("." in keep)))
        and satisfies(cell, parse_setting(setting))
    ]
    most = max((cell.n_samples for cell in measured), default=0)
    newest_last = sorted(measured, key=lambda cell: cell.finished)
    by_seed = {cell.seed: cell for cell in newest_last if cell.n_samples == most}
    return [by_seed[seed] for seed in sorted(by_seed)]


def measured_by(table: str, cells: list) -> list:
    """The costs that the table's own experiment measured, if there are any: another run had other conditions."""
    return [cell for cell in cells if f"experiment={table}" in cell.command.split()] or cells


def is_drawn(method: str, setting: str) -> bool:
    """Whether a number depends on the seed, so that one seed is not enough."""
    return method == "random" or "decoding" in parse_setting(setting)


def compare(wanted: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """What was measured beside what is wanted, row by row.

    Adds to the columns of `wanted`

    - ours: the number, mean over the seeds where something is drawn; error: its standard error over the samples, or the
      standard deviation over the seeds; difference: ours minus the printed number
    - n_seeds (0: not measured yet), n_samples, n_failed, n_visual, n_kept (the nominal budget), layer_mean (visual
      tokens that enter a layer of the language model, mean over the layers), device, cell (where the records lie)
    - rank and printed_rank: 1 best, 2 second best of the budget, else 0; equal numbers share a rank, and the model with
      all tokens has none
    """
    named = {key: list(rows.itertuples(index=False)) for key, rows in cells.groupby(["model", "dataset", "method"])}
    rows = []
    for want in wanted.itertuples(index=False):
        source = load.EFFICIENCY if want.metric.endswith(COSTS) else want.dataset
        candidates = named.get((want.model, source, want.method), [])
        if source == load.EFFICIENCY:
            candidates = measured_by(want.table, candidates)
        found = find([cell for cell in candidates if want.metric in cell.metrics], want.method, want.keep, want.setting)
        values = [cell.metrics[want.metric] for cell in found]
        errors = [cell.standard_errors.get(want.metric, math.nan) for cell in found] or [math.nan]
        row = {
            "ours": np.mean(values) if found else math.nan,
            "error": np.std(values, ddof=1) if len(found) > 1 else errors[0],
        }
        row["difference"] = row["ours"] - want.value
        row["n_seeds"] = len(found)
        for name in ("n_samples", "n_failed", "n_visual", "n_kept", "layer_mean"):
            row[name] = np.mean([getattr(cell, name) for cell in found]) if found else math.nan
        row["device"] = found[0].device if found else ""
        row["cell"] = " ".join(cell.path.as_posix() for cell in found)
        rows.append(row)
    table = pd.concat([wanted, pd.DataFrame(rows, index=wanted.index)], axis=1)
    table["digits"] = [
        2 if want.printed else DIGITS.get(plain(want.metric), 1) for want in wanted.itertuples(index=False)
    ]
    table["rank"], table["printed_rank"] = 0, 0
    pruned = table[table.method != "none"]
    for (*_, metric), group in pruned.groupby(["model", "keep", "dataset", "metric"], sort=False):
        better = BETTER.get(plain(metric), "higher")
        table.loc[group.index, "rank"] = ranks(group.ours.round(group.digits.iloc[0]), better)
        table.loc[group.index, "printed_rank"] = ranks(group.value, better)
    return table


def plain(metric: str) -> str:
    """The metric's name without POPE's split."""
    return next((name for name in METRICS if metric.endswith(f"_{name}")), metric)


def ranks(values: pd.Series, better: str | None) -> pd.Series:
    """1 for the best values, 2 for the second best, else 0; a number that stands alone is not best."""
    if better is None or values.count() < 2:
        return pd.Series(0, values.index)
    rank = values.rank(method="dense", ascending=better == "lower")
    return rank.where(rank <= 2, 0).astype(int)


def commands(table: pd.DataFrame) -> list[str]:
    """The commands that measure what is still empty: one per method and budget, or one for all costs."""
    empty = table[table.n_seeds == 0]
    lines = [f"python run.py experiment={name}" for name in empty.table[empty.metric.isin(COSTS)].unique()]
    for (model, keep, method, setting), row in empty[~empty.metric.isin(COSTS)].groupby(
        ["model", "keep", "method", "setting"], sort=False
    ):
        options = [
            f"{key}={value}" if key == "decoding" else f"pruner.{key}={value}"
            for key, value in parse_setting(setting).items()
        ]
        options += ["seed=0,1,2"] if is_drawn(method, setting) else []
        datasets = ",".join(dict.fromkeys(row.dataset))
        multirun = "-m " if "," in datasets or is_drawn(method, setting) else ""
        words = [f"model={model}", f"dataset={datasets}", f"pruner={method}", f"keep={keep}", *options]
        lines.append(f"python run.py {multirun}{' '.join(words)}")
    return lines


# --------------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Entry:
    """One number as text: ours, the paper's, and the difference."""

    ours: str = ""
    error: str = ""
    rank: int = 0
    paper: str = ""
    paper_spread: str = ""
    paper_rank: int = 0
    difference: str = ""
    marks: str = ""


@dataclass(frozen=True)
class Row:
    label: str
    marks: str
    tokens: str
    layer_mean: str
    entries: list[Entry]
    against: str = ""


@dataclass(frozen=True)
class Grid:
    """A table as text, ready for any of the renderers. A head, a row or an entry carries the marks of its footnotes."""

    name: str
    title: str
    heads: list[tuple[str, str]]
    groups: list[tuple[str, list[Row]]]
    footnotes: dict[str, str]
    remarks: list[str]
    commands: list[str]

    @property
    def is_paired(self) -> bool:
        """Whether any row was compared with MI-Pruner question by question."""
        return any(row.against for _, rows in self.groups for row in rows)


AGAINST = (
    "Against MI-Pruner: the difference in correct answers at the same budget, in points, paired question by question"
    " over all datasets of the row; ± is its standard error, clustered by image."
)


def grid(table: pd.DataFrame) -> Grid:
    """Lay out a compared table."""
    table = table.assign(
        row=list(table[["model", "keep", "method", "setting"]].itertuples(index=False, name=None)),
        column=list(table[["dataset", "metric"]].itertuples(index=False, name=None)),
    )
    marks, footnotes = place_footnotes(table)
    columns = list(dict.fromkeys(table.column))
    gains = paired.against(table)
    groups: dict[str, list[Row]] = {}
    for key, numbers in table.groupby("row", sort=False):
        model, keep, method, setting = key
        title = conf.title("model", model) + ("" if method == "none" else f", keep {budget_name(keep)}")
        label = METHODS.get(method, method) + (f" ({setting})" if setting else "")
        entries = {number.column: entry(number, marks.get((key, number.column), "")) for number in numbers.itertuples()}
        cells = [entries.get(column, Entry()) for column in columns]
        gain = "{:+.1f} ± {:.1f}".format(*gains[key]) if key in gains else ""
        row = Row(label, marks.get(key, ""), span(numbers.n_kept), span(numbers.layer_mean), cells, gain)
        groups.setdefault(title, []).append(row)
    name = table.table.iloc[0]
    return Grid(
        name,
        conf.experiment_title(name),
        [(column_name(*column), marks.get(column, "")) for column in columns],
        [*groups.items()],
        footnotes,
        remarks(table) + ([AGAINST] if gains else []),
        commands(table),
    )


def place_footnotes(table: pd.DataFrame) -> tuple[dict, dict[str, str]]:
    """Marks by column, row or (row, column), and the footnotes by mark.

    A footnote of every number of a column or of a row is marked once, at its head.
    """
    explanations = load.paper_notes()
    counts = table.groupby("dataset").n_samples.transform("max")
    holders: dict[str, set] = {}
    for number, expected in zip(table.itertuples(), counts, strict=True):
        texts = [explanations[note] for note in number.notes]
        if number.n_failed > 0:
            texts.append(f"{number.n_failed:.0f} of {number.n_samples:.0f} samples failed and count as wrong.")
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


def entry(number, marks: str) -> Entry:
    def text(value: float, sign: str = "") -> str:
        return "" if math.isnan(value) else f"{value:{sign}.{number.digits}f}"

    return Entry(
        text(number.ours),
        text(number.error),
        number.rank,
        number.printed,
        text(number.spread),
        number.printed_rank,
        text(number.difference, "+z"),
        marks,
    )


def column_name(dataset: str, metric: str) -> str:
    """``POPE random F1``; a task of the demo goes by its own name, ``GQA``."""
    if metric in COSTS:
        return METRICS[metric]
    split = metric.removesuffix(plain(metric)).rstrip("_")
    known = conf.names("dataset")
    if metric in known or split in known:
        named = conf.title("dataset", metric) if metric in known else METRICS[plain(metric)]
        return " ".join(filter(None, [split and conf.title("dataset", split), named]))
    return " ".join(filter(None, [conf.title("dataset", dataset), split, METRICS.get(plain(metric), plain(metric))]))


def budget_name(keep: str) -> str:
    return f"{float(keep):.0%}" if "." in keep else keep


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


# ------------------------------------------------------------------------------------------------------------ renderers


def markdown(grid: Grid) -> str:
    def sup(marks: str) -> str:
        return f"<sup>{marks}</sup>" if marks else ""

    def ranked(text: str, rank: int) -> str:
        return {1: f"**{text}**", 2: f"<u>{text}</u>"}.get(rank, text)

    def cell(entry: Entry) -> str:
        ours = ranked(entry.ours, entry.rank) + (f" ± {entry.error}" if entry.error else "")
        if not entry.paper:
            return (ours or "–") + sup(entry.marks)
        paper = ranked(entry.paper, entry.paper_rank) + (f" ± {entry.paper_spread}" if entry.paper_spread else "")
        difference = f" ({entry.difference})" if entry.difference else ""
        return f"{ours or '–'}<br>paper {paper}{difference}{sup(entry.marks)}"

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    head = ["", "tokens", "per layer", *(title + sup(marks) for title, marks in grid.heads)]
    head += ["against MI-Pruner"] * grid.is_paired
    lines = [f"### {grid.title}", "", line(head), line(["---", *["---:"] * (len(head) - 1)])]
    for title, rows in grid.groups:
        lines.append(line([f"*{title}*", *[""] * (len(head) - 1)]))
        for row in rows:
            cells = [row.label + sup(row.marks), row.tokens, row.layer_mean, *map(cell, row.entries)]
            lines.append(line(cells + [row.against] * grid.is_paired))
    lines += ["", " ".join(grid.remarks), ""]
    lines += [f"<sup>{mark}</sup> {text}  " for mark, text in grid.footnotes.items()]
    if grid.commands:
        lines += ["", "Not run yet:", "", "```bash", *grid.commands, "```"]
    return "\n".join(lines).rstrip() + "\n"


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
LATEX |= {"–": "--", "<": r"$<$", ">": r"$>$"} | {char: f"\\{char}" for char in "&%$#_{}"}


def latex(grid: Grid) -> str:
    """A ``table`` environment that needs the packages booktabs and graphicx."""

    def escape(text: str) -> str:
        return "".join(LATEX.get(char, char) for char in text)

    def sup(marks: str) -> str:
        return rf"\textsuperscript{{{marks}}}" if marks else ""

    def ranked(text: str, rank: int) -> str:
        return {1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(rank, text)

    def small(text: str) -> str:
        return rf"{{\scriptsize {text}}}" if text else ""

    def ours(entry: Entry) -> str:
        text = ranked(entry.ours, entry.rank) + small(rf"$\pm${entry.error}" if entry.error else "")
        return text + ("" if entry.paper else sup(entry.marks))

    def paper(entry: Entry) -> str:
        spread = rf"$\pm${entry.paper_spread}" if entry.paper_spread else ""
        difference = f" ({entry.difference})" if entry.difference else ""
        return (
            small(ranked(entry.paper, entry.paper_rank) + spread + difference + sup(entry.marks)) if entry.paper else ""
        )

    width = 3 + len(grid.heads) + grid.is_paired
    head = ["", "tokens", "per layer", *(escape(title) + sup(marks) for title, marks in grid.heads)]
    head += ["against MI-Pruner"] * grid.is_paired
    lines = [
        "% needs \\usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(grid.title)}. {escape(' '.join(grid.remarks))}}}",
        rf"\label{{tab:{grid.name.replace('_', '-')}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
    ]
    for title, rows in grid.groups:
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\textit{{{escape(title)}}}}} \\"]
        for row in rows:
            cells = [escape(row.label) + sup(row.marks), escape(row.tokens), escape(row.layer_mean)]
            gain = [escape(row.against)] * grid.is_paired
            lines.append(" & ".join([*cells, *map(ours, row.entries), *gain]) + r" \\")
            if any(entry.paper for entry in row.entries):
                papers = [r"\quad{\scriptsize paper}", "", "", *map(paper, row.entries), *[""] * grid.is_paired]
                lines.append(" & ".join(papers) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if grid.footnotes:
        notes = [rf"\textsuperscript{{{mark}}} {escape(text)}" for mark, text in grid.footnotes.items()]
        lines += ["", r"\smallskip", rf"\parbox{{\linewidth}}{{\scriptsize {' '.join(notes)}}}"]
    return "\n".join([*lines, r"\end{table}", ""])


def csv(table: pd.DataFrame) -> str:
    """All numbers of a compared table, one a line."""
    table = table.drop(columns=["digits", "value"]).assign(notes=table.notes.map(" ".join))
    return table.rename(columns={"printed": "paper", "spread": "paper_spread"}).to_csv(index=False)


# -------------------------------------------------------------------------------------------------------------- command


def write(names: list[str], results: Path, out: Path) -> list[Path]:
    """Build the tables and write each as NAME.md, NAME.tex and NAME.csv."""
    cells = load.cells(results)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        table = compare(wanted(name), cells)
        layout = grid(table)
        for suffix, text in ((".md", markdown(layout)), (".tex", latex(layout)), (".csv", csv(table))):
            written.append(out / f"{name}{suffix}")
            written[-1].write_text(text)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", default=table_names(), metavar="NAME", help=", ".join(table_names()))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    try:
        written = write(arguments.table, arguments.results, arguments.out)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
