"""Draws figures from the result records, as PDF and PNG.

    python -m analysis.figures                                      all of them, from results/ into docs/results/
    python -m analysis.figures --figure fig6b --results results --out figures

A figure draws the same comparison as a table (`analysis.compare`). Missing numbers are not drawn. Numbers of the paper
are hollow markers. The colours are those of Okabe and Ito, which readers with colour blindness can distinguish. Every
method has its own marker for grey prints.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import compare, load
from analysis.command import arguments
from experiments import conf
from mipruner.pruners import PRUNERS, DecoderPruner, Method

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = [
    "#000000",
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#d9c400",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
]
GREY = "#8c8c8c"
OWN = {"mi": RED, "mi_attention": ORANGE, "similarity": BLUE, "attention": SKY, "random": GREY}
MARKERS = "os^vxDPX<dph*>H"


def kin(cls: type[Method]) -> tuple[str, str]:
    """Colour and line of a published method, by its kind."""
    if issubclass(cls, DecoderPruner):
        return PINK, "--"
    return (SKY, "--") if "attention" in cls().needs else (GREEN, "-.")


def styles() -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line by method. No two methods have the same colour and marker.

    The paper's own methods have solid lines. Other methods: pink prunes inside the language model, sky blue reads the
    encoder's attention, green selects diverse tokens.
    """
    found, taken = {}, set()
    for place, name in enumerate([*OWN, *(name for name in PRUNERS if name not in (*OWN, "none"))]):
        colour, line = (OWN[name], "-") if name in OWN else kin(PRUNERS[name])
        marker = next(m for m in MARKERS[place % 15 :] + MARKERS if (colour, m) not in taken)
        taken.add((colour, marker))
        found[name] = (colour, marker, line)
    return found


STYLES = styles()


def style_of(method: str) -> tuple[str, str, str]:
    """Colour, marker and line of a method; a grey star if it is not installed."""
    return STYLES.get(method, (GREY, "*", ":"))


PAPER = ", paper"
COLUMN, PAGE = 3.4, 7.0
"""Widths of one column and of a page in inches. Text has at least 7 points at that size."""

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "figure.constrained_layout.use": True,
}
"""matplotlib settings for these figures only."""


def panels(table: pd.DataFrame, by: list[str]) -> tuple[Figure, list[tuple[tuple, pd.DataFrame, Axes]]]:
    """Create a figure with one panel per value of the columns ``by``. Panels are (value, rows, axes)."""
    groups = list(table.groupby(by, sort=False))
    columns = len(groups) if len(groups) < 4 else 2 if len(groups) == 4 else 3
    rows = math.ceil(len(groups) / columns)
    width = PAGE if columns > 1 else COLUMN if table.method.nunique() < 6 else 1.4 * COLUMN
    figure, axes = plt.subplots(rows, columns, figsize=(width, 2.4 * rows), squeeze=False)
    for empty in axes.flat[len(groups) :]:
        empty.set_axis_off()
    return figure, [(value, rows, ax) for (value, rows), ax in zip(groups, axes.flat, strict=False)]


def legend(figure: Figure) -> None:
    """Draw one legend below all panels, with the paper's hollow markers last."""
    handles = {
        label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    labels = sorted(handles, key=lambda label: label.endswith(PAPER))
    columns = max(1, int(figure.get_figwidth() / (0.55 + 0.062 * max(map(len, labels)))))
    figure.set_figheight(figure.get_figheight() + 0.16 * math.ceil(len(labels) / columns))
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=columns)


def draw(ax: Axes, x, rows: pd.DataFrame, label: str, colour: str, marker: str, line: str = "-") -> None:
    """Draw measured numbers with error bars, and numbers of the paper as hollow markers of the same shape."""
    ax.errorbar(x, rows.ours, rows.error.fillna(0), label=label, color=colour, marker=marker, ls=line, elinewidth=0.8)
    if rows.value.notna().any():
        ax.plot(x, rows.value, color=colour, marker=marker, ls="none", markerfacecolor="none", label=label + PAPER)


def y_label(rows: pd.DataFrame) -> str:
    metric = rows.metric.iloc[0]
    return compare.column_name(rows.dataset.iloc[0], metric) + (" (%)" if compare.plain(metric) == "accuracy" else "")


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """The first metric of each dataset."""
    return table[table.metric == table.groupby("dataset").metric.transform("first")]


def over_budget(table: pd.DataFrame) -> Figure:
    """Accuracy over the budget, one line per method, one panel per model and dataset (Fig. 4 of the paper)."""
    figure, parts = panels(headline(table), ["model", "dataset"])
    for (model, _), rows, ax in parts:
        fraction = rows.keep[rows.method != "none"].str.contains(".", regex=False).all()
        for method, line in rows[rows.method != "none"].groupby("method", sort=False):
            x = line.keep.astype(float) * (100 if fraction else 1)
            draw(ax, x, line, compare.METHODS.get(method, method), *style_of(method))
        for full in rows[(rows.method == "none") & rows.ours.notna()].head(1).itertuples():
            ax.axhline(full.ours, color=BLACK, lw=0.8, ls=(0, (4, 2)), label=compare.METHODS["none"])
        budgets = sorted(rows.keep[rows.method != "none"].astype(float).unique() * (100 if fraction else 1))
        ax.set_xscale("log", base=2)
        ax.set_xticks(budgets, [f"{budget:.3g}" for budget in budgets], minor=False)
        ax.set(xlabel="visual tokens kept (%)" if fraction else "visual tokens kept", ylabel=y_label(rows))
        ax.set_title(conf.title("model", model))
    legend(figure)
    return figure


def over_setting(table: pd.DataFrame) -> Figure:
    """Accuracy over a number such as lam, one line per budget, one panel per model and dataset (Fig. 6b)."""
    figure, parts = panels(headline(table), ["model", "dataset"])
    (name,) = {key for setting in table.setting for key in compare.parse_setting(setting)}
    for (model, _), rows, ax in parts:
        for (keep, line), style in zip(rows.groupby("keep", sort=False), STYLES.values(), strict=False):
            x = line.setting.map(lambda setting: float(compare.parse_setting(setting)[name]))
            draw(ax, x, line, f"keep {compare.budget_name(keep)}", *style)
            if line.ours.notna().any():
                best = line.loc[line.ours.idxmax()]
                on_top = best.ours == rows.ours[rows.setting == best.setting].max()
                place = (0, 6 if on_top else -16)
                at = (x[best.name], best.ours)
                ax.annotate(f"{best.ours:.1f}", at, xytext=place, textcoords="offset points", ha="center")
        ax.margins(y=0.15)
        ax.set(xlabel={"lam": "\u03bb", "tau": "\u03c4"}.get(name, name), ylabel=y_label(rows))
        ax.set_title(conf.title("model", model))
    legend(figure)
    return figure


def choices(table: pd.DataFrame) -> Figure:
    """Accuracy for the values of a setting, by dataset and budget (Fig. 6a, Tables 5 and 6 of the paper)."""
    table = headline(table)
    figure, parts = panels(table, ["model", "metric"])
    for (model, _), rows, ax in parts:
        budgets = list(dict.fromkeys(rows.keep))
        places = [(dataset, keep) for dataset in dict.fromkeys(rows.dataset) for keep in budgets]
        settings = list(rows.groupby("setting", sort=False))
        for i, ((setting, points), (colour, marker, _)) in enumerate(zip(settings, STYLES.values(), strict=False)):
            shift = (i - (len(settings) - 1) / 2) * 0.18
            x = [places.index(place) + shift for place in zip(points.dataset, points.keep, strict=True)]
            draw(ax, x, points, setting.replace("=", " = "), colour, marker, "none")
        names = [f"{conf.title('dataset', dataset)}\n{compare.budget_name(keep)}" for dataset, keep in places]
        ax.set_xticks(range(len(places)), names)
        ax.set_xlim(-0.5, len(places) - 0.5)
        ax.grid(axis="x", visible=False)
        ax.set(ylabel="accuracy (%)", title=conf.title("model", model))
    legend(figure)
    return figure


def tradeoff(table: pd.DataFrame, cells: pd.DataFrame) -> Figure:
    """Accuracy over latency, one point per method, one panel per model, dataset and budget. Up and left is better.

    The latency is that of single prompts if task=efficiency measured it, else that of the evaluation.
    """
    table = headline(table)
    lam = {cell.path.as_posix(): cell.settings.get("lam") for cell in cells.itertuples()}
    lam = table.cell.str.split(" ").str[0].map(lam)
    with_lam = table.setting.where(lam.isna(), "lam=" + lam.astype(str))  # how Table 3 names MI-Pruner

    def cost(metric: str, setting: pd.Series) -> pd.Series:
        columns = {"metric": metric, "setting": setting, "value": math.nan, "printed": ""}
        return compare.compare(table[compare.WANTED].assign(**columns), cells).ours

    single = cost("latency_ms", table.setting).fillna(cost("latency_ms", with_lam))
    batched = cost("total_ms_in_batches", table.setting)
    table = table.assign(latency_ms=single if single.notna().any() else batched)
    label = "latency of one prompt (ms)" if single.notna().any() else "latency a question, in batches (ms)"
    table = table[table.ours.notna() & table.latency_ms.notna()]
    figure, parts = panels(table[table.method != "none"], ["model", "dataset", "keep"])
    for (model, dataset, keep), rows, ax in parts:
        for point in rows.fillna({"error": 0}).itertuples():
            colour, marker, _ = style_of(point.method)
            ax.errorbar(
                point.latency_ms,
                point.ours,
                point.error,
                label=compare.METHODS.get(point.method, point.method),
                color=colour,
                marker=marker,
                ls="none",
                elinewidth=0.8,
            )
        full = table[(table.model == model) & (table.dataset == dataset) & (table.method == "none")]
        for point in full.head(1).itertuples():
            ax.plot(
                point.latency_ms, point.ours, color=BLACK, marker="*", ms=7, ls="none", label=compare.METHODS["none"]
            )
        ax.set(xlabel=label, ylabel=y_label(rows))
        ax.set_title(f"{conf.title('model', model)}, keep {compare.budget_name(keep)}")
    legend(figure)
    return figure


def stages(table: pd.DataFrame, cells: pd.DataFrame) -> Figure:
    """Time of one prompt by stage, one bar per method, one panel per budget (Fig. 2, right, of the paper)."""
    latency = table[(table.metric == "latency_ms") & table.ours.notna()]
    budgets = latency[latency.method != "none"].groupby(["model", "keep"], sort=False)
    figure, parts = panels(latency[latency.method != "none"], ["model", "keep"])
    figure.set_figheight(len(parts) and 0.22 * max(budgets.size()) + 1.6)
    for (model, keep), rows, ax in parts:
        rows = pd.concat([latency[(latency.model == model) & (latency.method == "none")], rows])[::-1]
        names = [
            compare.METHODS.get(row.method, row.method) + (f" ({row.setting})" if row.setting else "")
            for row in rows.itertuples()
        ]
        left = 0.0
        for stage, colour in STAGES.items():
            part = rows[compare.WANTED].assign(value=math.nan, printed="", metric=f"{stage}_latency_ms")
            ms = compare.compare(part, cells).ours.fillna(0).to_numpy()
            ax.barh(names, ms, left=left, color=colour, height=0.7, label=stage)
            left = left + ms
        if rows.value.notna().any():
            ax.plot(rows.value, names, "D", color=BLACK, markerfacecolor="none", label=f"total{PAPER}")
        ax.grid(axis="y", visible=False)
        ax.set(
            xlabel="latency of one prompt (ms)",
            title=f"{conf.title('model', model)}, keep {compare.budget_name(keep)}",
        )
    legend(figure)
    return figure


STAGES = {"vision": SKY, "scoring": RED, "prefill": BLUE, "decode": GREY}

FIGURES: dict[str, tuple[Callable[..., Figure], str]] = {
    "fig2": (stages, "table3"),
    "fig4": (over_budget, "fig4"),
    "fig6a": (choices, "fig6a"),
    "fig6b": (over_setting, "fig6b"),
    "table5": (choices, "table5"),
    "table6": (choices, "table6"),
    "tradeoff": (tradeoff, "table1"),
    "demo_table1": (over_budget, "demo_table1"),
    "demo_table2": (over_budget, "demo_table2"),
    "demo_fig2": (stages, "demo_table3"),
    "demo_fig4": (over_budget, "demo_fig4"),
    "demo_fig6a": (choices, "demo_fig6a"),
    "demo_fig6b": (over_setting, "demo_fig6b"),
    "demo_table5": (choices, "demo_table5"),
    "demo_table6": (choices, "demo_table6"),
    "demo_tradeoff": (tradeoff, "demo_table1"),
}
"""Figures by name: drawing function and table or experiment."""


def draw_figure(name: str, cells: pd.DataFrame) -> Figure | None:
    """The figure of this name; None if no number, or only one of the compared values, was measured.

    Raises
    ------
    ValueError
        If there is no such figure.
    """
    if name not in FIGURES:
        raise ValueError(f"there is no figure {name!r}: choose from {', '.join(FIGURES)}")
    kind, source = FIGURES[name]
    table = compare.compare(compare.wanted(source), cells)
    there = table.ours.notna() | table.value.notna()
    table = table[there.groupby([table.method, table.setting]).transform("any")]
    measured = table[table.ours.notna()]
    if measured.empty or (kind in (choices, over_setting) and measured.setting.nunique() < 2):
        return None
    with plt.rc_context(STYLE):
        return kind(table, cells) if kind in (tradeoff, stages) else kind(table)


def write(names: list[str], results: Path, out: Path) -> list[Path]:
    """Draw the figures that have measured numbers, each as NAME.pdf and NAME.png."""
    cells = load.cells(results)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        figure = draw_figure(name, cells)
        if figure is None:
            continue
        written += save(figure, out / name)
        plt.close(figure)
    return written


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PDF, without the date, and as PNG."""
    files = [path.with_name(f"{path.name}{suffix}") for suffix in (".pdf", ".png")]
    with plt.rc_context(STYLE):
        for file in files:
            figure.savefig(file, dpi=200, metadata={"CreationDate": None} if file.suffix == ".pdf" else None)
    return files


def main() -> None:
    parser = arguments(__doc__, "docs/results", reads_results=True)
    parser.add_argument("--figure", nargs="+", default=list(FIGURES), metavar="NAME", help=", ".join(FIGURES))
    args = parser.parse_args()
    try:
        written = write(args.figure, args.results, args.out)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print("\n".join(map(str, written)) or f"nothing of {', '.join(args.figure)} has been measured yet")


if __name__ == "__main__":
    main()
