"""Compares measured numbers with those that tables and figures need, and lists the commands for missing ones.

A table is a list of wanted numbers in print order: those of paper.csv, or the product of the values that a file of
conf/experiment sweeps. `compare` looks each of them up in the result records; a number that nobody has measured stays
empty.
"""

import itertools
import math

import numpy as np
import pandas as pd
import yaml

from analysis import load
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

COUNTS = ("n_samples", "n_failed", "n_skipped", "n_empty", "n_unreadable")
COSTS = ("peak_memory_gib", "latency_ms")
"""What task=efficiency measures, the latency also by stage (``vision_latency_ms``)."""

WANTED = ["table", "model", "keep", "method", "setting", "dataset", "metric"]


# ---------------------------------------------------------------------------------------------------------------- names


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
    experiment = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text(encoding="utf-8"))
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
    """Whether two values are equal as numbers, or else as strings."""
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return str(a) == str(b)


def satisfies(cell, setting: dict[str, str]) -> bool:
    """Whether a cell has these settings and defaults for all others; ``decoding`` names a file of its group."""
    if "decoding" in setting:
        chosen = yaml.safe_load((conf.CONF / "decoding" / f"{setting['decoding']}.yaml").read_text(encoding="utf-8"))
        setting = {key: value for key, value in (setting | chosen).items() if key not in ("decoding", "defaults")}
    return all(same(cell.settings.get(key), value) for key, value in setting.items()) and cell.differs <= set(setting)


def find(cells: list, method: str, keep: str, setting: str = "") -> list:
    """The cells of one method that measured this budget, one per seed.

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
    """The costs that the table's own experiment measured, if any; other runs have other conditions."""
    return [cell for cell in cells if f"experiment={table}" in cell.command.split()] or cells


def is_drawn(method: str, setting: str) -> bool:
    """Whether a number depends on the seed, so that several seeds are needed."""
    return method == "random" or "decoding" in parse_setting(setting)


def compare(wanted: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Measured numbers beside the wanted ones, row by row.

    Adds to the columns of `wanted`

    - ours: the number, mean over the seeds where something is drawn; error: its standard error over the samples, or the
      standard deviation over the seeds; difference: ours minus the printed number
    - n_seeds (0: not measured yet), `COUNTS`, n_visual, n_kept (the nominal budget), layer_mean (visual
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
        for name in (*COUNTS, "n_visual", "n_kept", "layer_mean"):
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
    """1 for the best values, 2 for the second best, else 0; a single number has no rank."""
    if better is None or values.count() < 2:
        return pd.Series(0, values.index)
    rank = values.rank(method="dense", ascending=better == "lower")
    return rank.where(rank <= 2, 0).astype(int)


def commands(table: pd.DataFrame) -> list[str]:
    """The commands that measure missing numbers: one per method and budget, or one for all costs."""
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
