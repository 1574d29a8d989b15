"""Builds the table of methods in docs/methods.md: where each acts, its inputs, its cost, its accuracy on the demo."""

from collections.abc import Iterable

import pandas as pd

from analysis.compare import METHODS
from experiments.tabular import Cell, Span, Table
from mipruner.pruners import PRUNERS, DecoderPruner, ImagePruner

BUDGETS = ("64", "32", "16", "8")


def link(method: str) -> str:
    """Title of a method, linked to its paper."""
    cls = PRUNERS[method]
    return f"[{cls.title}]({cls.paper})" if cls.paper else cls.title


def acts(method: str) -> str:
    cls = PRUNERS[method]
    if issubclass(cls, ImagePruner):
        return "before the encoder"
    return "inside the decoder" if issubclass(cls, DecoderPruner) else "before the decoder"


def accuracies(cells: pd.DataFrame, names: Iterable[str]) -> dict[str, list[Cell]]:
    """Mean accuracy of each method at each of `BUDGETS`, as text; the best is bold. Empty if not measured."""
    scores = mean_accuracy(cells)
    texts = {name: [f"{scores[name, k]:.1f}" if (name, k) in scores else "" for k in BUDGETS] for name in names}
    best = [max(filter(None, column), key=float, default=None) for column in zip(*texts.values(), strict=True)]
    return {
        name: [Span(text, "bold") if text == top else text for text, top in zip(row, best, strict=True)]
        for name, row in texts.items()
    }


def mean_accuracy(cells: pd.DataFrame) -> pd.Series:
    """Mean accuracy over the cells of a method and a budget."""
    found = cells.assign(accuracy=[metrics["accuracy"] for metrics in cells.metrics])
    return found.groupby(["method", "keep"]).accuracy.mean()


def table(cells: pd.DataFrame) -> str:
    """The table as Markdown. ``cells`` have one model and dataset and default settings, see `analysis.load.cells`."""
    means = cells.groupby(["method", "keep"]).layer_mean.mean()
    lines = []
    for method, scores in accuracies(cells, [name for name in METHODS if name != "none"]).items():
        facts = PRUNERS[method]
        carried = ", ".join(f"{means[method, keep]:.0f}" for keep in ("64", "8") if (method, keep) in means)
        lines.append([link(method), acts(method), facts.reads, facts.cost, *scores, carried])
    errors = [error["accuracy"] for error in cells.standard_errors]
    source = (
        f"{int(cells.n_samples.max())} questions, standard errors {min(errors):.1f} to {max(errors):.1f}: "
        "`python run.py -m experiment=demo_table1`."
    )
    head = ["method", "acts", "needs", "cost", *BUDGETS, "tokens a layer at 64, 8"]
    return f"{Table(head, lines, n_text=4).markdown()}\n\n{ahead(mean_accuracy(cells), means)} {source}"


def ahead(scores: pd.Series, means: pd.Series) -> str:
    """One sentence per budget with all methods of higher accuracy than MI-Pruner."""
    sentences = []
    for keep in BUDGETS:
        if ("mi", keep) not in scores:
            continue
        better = scores[:, keep].drop("none", errors="ignore")
        better = better[better > scores["mi", keep]].sort_values(ascending=False)
        names = [
            f"{METHODS[name]} {value:.1f}"
            + (f" with {means[name, keep]:.0f} tokens a layer" if means[name, keep] > float(keep) + 0.5 else "")
            for name, value in better.items()
        ]
        told = f"{', '.join(names)} beat" + ("s" if len(names) == 1 else "") if names else "none beats"
        sentences.append(f"At {keep} tokens {told} MI-Pruner's {scores['mi', keep]:.1f}.")
    return " ".join(sentences)
