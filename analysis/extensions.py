"""Writes the measured tables of docs/extensions.md: options beyond the paper, on the demo models.

    python -m analysis.extensions                      from results/

Accuracy is the mean over draws of the scenes (the dataset's seed); ± is the standard deviation over draws. The page has
the commands for the records.
"""

import math
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pandas as pd

from analysis import load, paired
from analysis.command import arguments
from analysis.compare import METHODS, budget_name
from analysis.pages import replace
from experiments import conf
from experiments.demo.reading import FORMS
from experiments.tabular import Span, Table

PAGE = Path(__file__).parent.parent / "docs" / "extensions.md"
DEMOS = {"demo_llava": "demo", "demo_qwen3vl": "demo_canvases"}
OPTIONS = {"support", "lam", "prior", "prior_table", "seed", "quality", "keep_max", "vocabulary_rows"}
"""Settings that may differ from the defaults in these tables."""


def select(cells: pd.DataFrame, model: str, method: str = "mi", **settings: Any) -> dict[str, list[Any]]:
    """Cells of a demo model with these settings and otherwise defaults: by budget, one per draw of the scenes.

    Of several cells with the same settings (for example with a limit), the one with the most samples is used.
    """
    found: dict[str, dict] = {}
    named = cells[(cells.model == model) & (cells.dataset == DEMOS[model]) & (cells.method == method)]
    for cell in sorted(named.itertuples(), key=lambda cell: cell.n_samples):
        wanted = {key: value for key, value in settings.items() if cell.settings.get(key) != value}
        if not wanted and cell.differs <= OPTIONS:
            found.setdefault(cell.keep, {})[cell.settings["seed"]] = cell
    return {keep: [draws[seed] for seed in sorted(draws)] for keep, draws in found.items()}


def number(cells: list) -> str:
    """Mean and standard deviation of the accuracy over draws, as text."""
    values = [cell.metrics["accuracy"] for cell in cells]
    if not values:
        return ""
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def markdown(head: list[str], rows: list[list[str]], compare: slice = slice(0)) -> str:
    """Markdown table. In each row the best of the columns ``compare`` is bold."""
    lines = []
    for row in rows:
        means = [float(text.split()[0]) if text else -math.inf for text in row[compare]]
        best = max(means, default=None)
        shown = [Span(t, "bold") if m == best else t for t, m in zip(row[compare], means, strict=True)]
        lines.append([*row[: compare.start or 0], *shown, *row[compare.stop :]])
    return Table(head, lines).markdown()


def grid(cells: pd.DataFrame, columns: dict[str, dict], reference: dict[str, dict]) -> str:
    """Accuracy by model and budget, one column per setting, for budgets that all columns have."""
    parts = []
    for model, dataset in DEMOS.items():
        found = {name: select(cells, model, **settings) for name, settings in columns.items()}
        budgets = sorted(set.intersection(*map(set, found.values())) - {"auto"}, key=float, reverse=True)
        if not budgets:
            continue
        found = {name: select(cells, model, **settings) for name, settings in reference.items()} | found
        rows = [[budget_name(keep), *(number(column.get(keep, [])) for column in found.values())] for keep in budgets]
        measured = found[list(columns)[-1]][budgets[0]]
        title = f"{conf.title('model', model)}, {conf.title('dataset', dataset)}: "
        title += f"{sum(c.n_samples for c in measured):,} questions in {len(measured)} draws, "
        title += f"{measured[0].n_visual:.0f} tokens an image on average"
        parts.append(f"{title}\n\n" + markdown(["kept", *found], rows, slice(1, len(found) + 1)))
    return "\n\n".join(parts)


def support(cells: pd.DataFrame) -> str:
    columns = {
        f"{word}, lam {lam:g}": {"support": word, "lam": lam, "prior": "uniform", "vocabulary_rows": None}
        for lam in (0.5, 0.8, 1)
        for word in ("prompt", "vocabulary")
    }
    return grid(cells, columns, {"similarity": {"method": "similarity"}})


def sample(cells: pd.DataFrame) -> str:
    """Accuracy with a sum over a sample of the vocabulary."""
    found = [
        select(cells, "demo_llava", support="vocabulary", lam=0.8, prior="uniform", vocabulary_rows=rows)
        for rows in (None, 84, 52, 26)
    ]
    if not found[-1]:
        return ""
    rows = [[keep, *(number(column.get(keep, [])) for column in found)] for keep in ("16", "8")]
    return markdown(["kept of 576", "all 105 rows", "84", "52", "26"], rows)


def prior(cells: pd.DataFrame) -> str:
    columns = {
        f"{name}, lam {lam:g}": {"prior": name, "lam": lam, "support": "prompt"}
        for lam in (0.5, 0.8)
        for name in ("uniform", "center", "thirds", "estimated")
    }
    return grid(cells, columns, {})


def beside_fixed(auto: pd.DataFrame, fixed: dict[int, pd.DataFrame]) -> pd.DataFrame:
    """``auto``, and the fixed budget with the same mean, for each sample.

    The latter is interpolated between two measured budgets, linearly in the log of the budget.
    """
    mean, budgets = auto.kept.mean(), sorted(fixed)
    low = max((b for b in budgets if b <= mean), default=budgets[0])
    high = min((b for b in budgets if b > low), default=low)
    share = 0 if high == low else (math.log(mean) - math.log(low)) / (math.log(high) - math.log(low))
    return auto.assign(fixed=(1 - share) * fixed[low].correct + share * fixed[high].correct)


def automatic(cells: pd.DataFrame) -> str:
    rows = []
    for model in DEMOS:
        for word in ("prompt", "vocabulary"):
            options: dict[str, Any] = {"support": word, "lam": 0.5, "prior": "uniform", "vocabulary_rows": None}
            found = select(cells, model, **options)
            whole = {
                int(keep): {c.settings["seed"]: c for c in draws} for keep, draws in found.items() if keep.isdigit()
            }
            auto = cells[(cells.model == model) & (cells.method == "mi") & (cells.keep == "auto")]
            for quality in sorted({cell.settings["quality"] for cell in auto.itertuples()}):
                draws = select(cells, model, **options, quality=quality).get("auto", [])
                tables = []
                for cell in draws:
                    seed = cell.settings["seed"]
                    fixed = {
                        keep: paired.answers(by_seed[seed].path) for keep, by_seed in whole.items() if seed in by_seed
                    }
                    if fixed:
                        tables.append(beside_fixed(paired.answers(cell.path), fixed).assign(seed=seed))
                if not tables:
                    continue
                both = pd.concat(tables)
                gain = 100 * (both.correct - both.fixed)
                by_image = gain.groupby([both.seed, both.image]).mean()
                error = by_image.std() / math.sqrt(len(by_image))
                name = f"{conf.title('model', model)}, {word}, quality {quality:g}"
                kept = (
                    f"{both.kept.mean():.1f} ({np.percentile(both.kept, 10):.0f} to {np.percentile(both.kept, 90):.0f})"
                )
                accuracy = [f"{100 * both.correct.mean():.1f}", f"{100 * both.fixed.mean():.1f}"]
                rows.append([name, kept, *accuracy, f"{gain.mean():+.1f} ± {error:.1f}"])
    header = ["", "tokens: mean (10 to 90 %)", "auto", "fixed at that mean", "difference ± standard error"]
    return markdown(header, rows) if rows else ""


def cover(cells: pd.DataFrame) -> str:
    """Cover minus each method with the same draws, by type of question and budget; one table per model.

    The draws of a budget are those that cover and MI-Pruner share. Shown are the budgets with most of them, and the
    methods that have them all.
    """
    if unknown := set(cells.method) - METHODS.keys():
        print(f"methods that are not installed are left out: {', '.join(sorted(unknown))}", file=sys.stderr)
    tables, n_contrasts = [], 0
    for model in DEMOS:
        found = {
            method: {keep: {c.settings["seed"]: c for c in draws} for keep, draws in by_budget.items()}
            for method in sorted(METHODS)
            if (by_budget := select(cells, model, method=method))
        }
        cover, mi = found.pop("cover", {}), found.get("mi", {})
        shared = {keep: cover[keep].keys() & mi[keep].keys() for keep in cover.keys() & mi.keys() - {"auto"}}
        most = max(map(len, shared.values()), default=0)
        rows, counts = [], {}
        for keep in sorted((keep for keep in shared if len(shared[keep]) == most > 0), key=float, reverse=True):
            for method, by_seed in ((name, found[name].get(keep, {})) for name in found if name != "none"):
                if not shared[keep] <= by_seed.keys():
                    continue
                pairs = [(cover[keep][seed], by_seed[seed]) for seed in sorted(shared[keep])]
                gains = pd.concat(paired.gains(a.path, b.path).assign(draw=a.settings["seed"]) for a, b in pairs)
                gains["image"] = gains.draw.astype(str) + ":" + gains.image.astype(str)
                parts = {"all": gains} | dict(list(gains.groupby("task")))
                counts = {task: len(part) for task, part in parts.items()}
                n_contrasts += len(parts)
                label = f"{conf.title('model', model)}, {budget_name(keep)}: {METHODS[method]}"
                shown = ["{:+.1f} ± {:.1f}".format(*paired.clustered(part)) for part in parts.values()]
                rows.append([label, number([b for _, b in pairs]), number([a for a, _ in pairs]), *shown])
        if rows:
            heads = [f"{conf.title('dataset', task)} ({n:,})" for task, n in counts.items()]
            tables.append(markdown(["", "accuracy", "cover", *heads], rows))
    said = f"{n_contrasts} contrasts were looked at; by chance one in twenty lies beyond two standard errors."
    return "\n\n".join([*tables, said]) if tables else ""


def candidates(cells: pd.DataFrame) -> str:
    """Accuracy of each form of question with all tokens, from the runs that asked all forms."""
    found = {}
    for cell in cells[(cells.dataset == "demo_reading") & (cells.method == "none")].itertuples():
        if set(FORMS) <= set(cell.metrics):
            found[cell.model] = cell
    if len(found) < len(DEMOS):
        return ""
    header = ["form", *(f"{conf.title('model', model)}, {found[model].n_samples} questions" for model in DEMOS)]
    rows = [
        [form, *(f"{c.metrics[form]:.1f} ± {c.standard_errors[form]:.1f}" for c in (found[m] for m in DEMOS))]
        for form in FORMS
    ]
    return markdown(header, rows)


BLOCKS = {
    "support": support,
    "sample": sample,
    "prior": prior,
    "auto": automatic,
    "cover": cover,
    "candidates": candidates,
}
"""Functions that write the blocks of the page, by name of the block."""


def main() -> None:
    parser = arguments(__doc__, reads_results=True)
    cells = load.cells(parser.parse_args().results)
    text = PAGE.read_text(encoding="utf-8")
    for name, table in BLOCKS.items():
        if part := table(cells):
            text = replace(text, name, part)
        else:
            print(f"nothing measured yet for {name}")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
