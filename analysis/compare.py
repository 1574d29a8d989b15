"""Compares measured numbers with those of tables and figures, and lists the commands for missing ones.

A table is a list of numbers in print order: those of paper.csv, or the product of the values that a file of
conf/experiment sweeps. `compare` looks up each of them in the records. A number without a record is empty.
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
"""Decimals of a number that the paper does not print: one for other metrics. Numbers of the paper have two."""

BETTER = {"latency_ms": "lower", "peak_memory_gib": "lower", "yes_rate": None}
"""Better direction by metric, without its split; ``higher`` for other metrics."""

COUNTS = ("n_samples", "n_failed", "n_skipped", "n_empty", "n_unreadable")
COSTS = ("peak_memory_gib", "latency_ms")
"""Metrics of task=efficiency. Latency exists also by stage (``vision_latency_ms``)."""

WANTED = ["table", "model", "keep", "method", "setting", "dataset", "metric"]


# ---------------------------------------------------------------------------------------------------------------- names


def place(method: str) -> tuple[int, str]:
    """Position of a method in the order of the tables. Methods that are not installed are last."""
    known = list(METHODS)
    return known.index(method) if method in known else len(known), method


def column_name(dataset: str, metric: str) -> str:
    """Name of a column, such as ``POPE random F1``. A task of the demo has its own name, such as ``GQA``."""
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
    """Numbers of one table in print order: the columns of `WANTED`, value, printed, spread and notes.

    Raises
    ------
    ValueError
        If there is no table of that name in the paper and no experiment.
    """
    paper = load.paper()
    if table in set(paper.table):
        return paper[paper.table == table].reset_index(drop=True)
    if not (EXPERIMENTS / f"{table}.yaml").exists():
        raise ValueError(f"there is no table {table!r}: choose from {', '.join(table_names())}")
    return from_experiment(table)


def from_experiment(name: str) -> pd.DataFrame:
    """Numbers that a file of conf/experiment measures, as in `wanted`, without numbers of the paper."""
    experiment = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text(encoding="utf-8"))
    rows = costs(name, experiment) if "methods" in experiment else product(name, sweep(experiment))
    frame = pd.DataFrame(rows, columns=WANTED)
    return frame.assign(value=math.nan, printed="", spread=math.nan, notes=[[] for _ in range(len(frame))])


def table_names() -> list[str]:
    """Names of the paper's tables, then of the demo's experiments."""
    return [*load.paper().table.unique(), *sorted(path.stem for path in EXPERIMENTS.glob("demo*.yaml"))]


def sweep(experiment: dict) -> dict[str, list[str]]:
    """Values that an experiment sweeps, by key of the command line."""
    params = experiment["hydra"]["sweeper"]["params"]
    return {key: [value.strip() for value in str(values).split(",")] for key, values in params.items()}


def costs(table: str, experiment: dict) -> list[tuple]:
    """Numbers that an experiment of task=efficiency measures, as rows of `WANTED`."""
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
    """Numbers that a sweep measures, as rows of `WANTED`. All seeds give one number; ``none`` has one budget."""
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
    """Parse ``"lam=1,tau=0.1"`` into a dictionary."""
    return dict(part.split("=", 1) for part in setting.split(",") if part)


def same(a, b) -> bool:
    """Whether two values are equal as numbers, or else as strings."""
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return str(a) == str(b)


def satisfies(cell, setting: dict[str, str]) -> bool:
    """Whether a cell has these settings, and defaults for all others. ``decoding`` names a file of its group."""
    if "decoding" in setting:
        chosen = yaml.safe_load((conf.CONF / "decoding" / f"{setting['decoding']}.yaml").read_text(encoding="utf-8"))
        setting = {key: value for key, value in (setting | chosen).items() if key not in ("decoding", "defaults")}
    return all(same(cell.settings.get(key), value) for key, value in setting.items()) and cell.differs <= set(setting)


def find(cells: list, method: str, keep: str, setting: str = "") -> list:
    """Cells of one method at this budget, one per seed.

    If there are several (for example with a limit), those with the most samples are used, and of these the newest.
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
    """Costs from the table's own experiment, if any, because other runs have other conditions."""
    return [cell for cell in cells if f"experiment={table}" in cell.command.split()] or cells


def is_drawn(method: str, setting: str) -> bool:
    """Whether a number depends on the seed, so that several seeds are needed."""
    return method == "random" or "decoding" in parse_setting(setting)


def compare(wanted: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Measured numbers for the rows of `wanted`.

    Adds to the columns of `wanted`

    - ours: the measured number, for random methods the mean over seeds; error: its standard error over the samples, or
      the standard deviation over seeds; difference: ours minus the printed number
    - n_seeds (0: not measured), `COUNTS`, n_visual, n_kept (nominal budget), layer_mean (visual tokens in a layer of
      the language model, mean over layers), device, cell (folder of the record)
    - rank and printed_rank: 1 for the best and 2 for the second best number of a budget, else 0. Equal numbers have the
      same rank. The model with all tokens has none
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
    """Name of a metric without POPE's split."""
    return next((name for name in METRICS if metric.endswith(f"_{name}")), metric)


def ranks(values: pd.Series, better: str | None) -> pd.Series:
    """1 for the best values, 2 for the second best, else 0; a single number has no rank."""
    if better is None or values.count() < 2:
        return pd.Series(0, values.index)
    rank = values.rank(method="dense", ascending=better == "lower")
    return rank.where(rank <= 2, 0).astype(int)


def commands(table: pd.DataFrame) -> list[str]:
    """Commands that measure missing numbers: one per method and budget, or one for all costs."""
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
