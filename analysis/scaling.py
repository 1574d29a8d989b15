"""Plots cost and benefit of token selection over image size, from the CSV of task=scaling.

    python -m analysis.scaling docs/results/scaling_cpu.csv --out docs/results/scaling_cpu.png

Left: time of the selection. Right: saved prefill time of LLaVA-1.5-7B per millisecond of selection; above the line at
1, pruning saves time. The figure is written as PDF and PNG.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.command import arguments
from analysis.figures import BLACK, GREEN, GREY, ORANGE, PAGE, PINK, RED, STYLE, YELLOW, save

LINES = {
    "mi": ("MI, λ = 0.5", RED, "o", "-"),
    "mi_graph": ("MI, λ = 0.5, CUDA graph", RED, "o", "--"),
    "mi_relevance": ("MI, λ = 1", ORANGE, "s", "-"),
    "mi_relevance_graph": ("MI, λ = 1, CUDA graph", ORANGE, "s", "--"),
    "mi_plain": ("MI, λ = 0.5, step by step", RED, "o", ":"),
    "cdpruner": ("CDPruner", GREEN, "h", "-."),
    "divprune": ("DivPrune", YELLOW, "*", "-."),
    "dart_like": ("DART's rule", PINK, "X", "--"),
    "product": ("product V Vᵀ alone", GREY, None, "-"),
}


def read(path: Path) -> pd.DataFrame:
    """Newest row of each method and size.

    Raises
    ------
    ValueError
        If the rows have several devices or precisions, which one figure must not mix.
    """
    rows = pd.read_csv(path)
    if len(rows[["device", "dtype"]].drop_duplicates()) != 1:
        raise ValueError(f"{path} mixes devices or precisions: draw one at a time")
    return rows.sort_values("date").groupby(["method", "n_visual", "n_keep"], as_index=False).last()


def series(rows: pd.DataFrame, method: str, share: float | None, n_keep: int | None) -> pd.DataFrame:
    """Rows of a method at a share, or at a number, of the tokens."""
    kept = rows.n_keep.eq(n_keep) if share is None else rows.n_keep.eq((share * rows.n_visual).round())
    return rows[rows.method.eq(method) & kept].sort_values("n_visual")


def draw(rows: pd.DataFrame, share: float = 0.25, n_keep: int = 64) -> Figure:
    """Draw both panels at a quarter of the tokens, and MI at 64 tokens with thin lines."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 0.42 * PAGE))
        for method, (label, colour, marker, line) in LINES.items():
            found = series(rows, method, share, None)
            if found.empty:
                continue
            left.plot(found.n_visual, found.median_ms, line, color=colour, marker=marker, label=label)
            left.fill_between(found.n_visual, found.p20_ms, found.p80_ms, color=colour, alpha=0.2, linewidth=0)
            if method != "product":
                right.plot(found.n_visual, found.prefill_saved_ms / found.median_ms, line, color=colour, marker=marker)
        few = series(rows, "mi", None, n_keep)
        left.plot(few.n_visual, few.median_ms, color=RED, linewidth=0.6)
        right.plot(few.n_visual, few.prefill_saved_ms / few.median_ms, color=RED, linewidth=0.6)
        right.axhline(1, color=BLACK, linewidth=0.8)
        _axis(left, sorted(rows.n_visual.unique()), "choice of tokens, ms")
        _axis(right, sorted(rows.n_visual.unique()), "prefill saved / choice")
        left.set_title(f"{share:.0%} kept (thin: {n_keep} tokens)")
        right.set_title("LLaVA-1.5-7B")
        figure.legend(loc="outside lower center", ncols=4)
        figure.suptitle(f"{rows.device.iloc[0]}, {rows.dtype.iloc[0]}", fontsize=7)
    return figure


def _axis(axes: Axes, sizes: list[int], label: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="visual tokens", ylabel=label)
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=45)
    axes.minorticks_off()


def main() -> None:
    parser = arguments(__doc__, out="scaling.png")
    parser.add_argument("csv", type=Path, metavar="CSV", help="what task=scaling wrote")
    args = parser.parse_args()
    print("\n".join(map(str, save(draw(read(args.csv)), args.out.with_suffix("")))))


if __name__ == "__main__":
    main()
