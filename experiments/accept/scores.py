"""Sections 6 and 7: compares benchmark scores of the model with published scores.

Each cell is an ordinary cell of the results folder, so `run.py` uses its record too. It runs on a fixed subset: `LIMIT`
questions of whole images drawn with seed 0 (all of MME, because its score counts pairs and categories). The score of
the subset is compared with the score of the whole dataset, within the confidence interval of the subset.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from statistics import stdev
from typing import Any

from experiments import build
from experiments.accept.published import PUBLISHED, published, read
from experiments.accept.report import Line, check, not_run
from experiments.benchmarks.base import Benchmark, BenchmarkError, Sample
from experiments.results import ROOT, Cell
from mipruner.errors import InputError

LIMIT = 500
WHOLE = ("mme",)
Z = 1.96
"""Two-sided 95 % quantile of the normal distribution."""

PAPER = ROOT / "analysis/paper.csv"
PAPER_METHODS = ("mi", "vispruner", "cdpruner")
PAPER_BUDGETS = (64, 128, 192)


def datasets(model: str) -> list[str]:
    """Datasets with a published unpruned score and without a judge."""
    names = dict.fromkeys(row["dataset"] for row in PUBLISHED if row["model"] == model)
    return [name for name in names if name not in ("mmvet", "tgif", "msvd", "msrvtt")]


def compose_cell(
    compose: Callable[[list[str]], dict[str, Any]], dataset: str, pruner: str, keep: Any
) -> dict[str, Any]:
    limit = [] if dataset in WHOLE else [f"limit={LIMIT}"]
    return compose([f"dataset={dataset}", f"pruner={pruner}", f"keep={keep}", *limit])


def check_scores(
    compose: Callable[[list[str]], dict[str, Any]], run: Callable[[dict[str, Any]], Any], model: str
) -> Iterator[Line]:
    """Lines for every published score of the unpruned model, for each protocol.

    Parameters
    ----------
    compose : callable
        The resolved config of a list of overrides, for this model.
    run : callable
        Runs or resumes the cell of a config.
    """
    if not datasets(model):
        yield not_run("published scores", f"none of {model} is known", source="published.csv")
    for dataset in datasets(model):
        config = compose_cell(compose, dataset, "none", 1.0)
        try:
            record = run(config)
        except BenchmarkError as error:
            yield not_run(dataset, str(error))
            continue
        for row in published(model, dataset):
            yield compare_score(config, record, row)


def compare_score(config: dict[str, Any], record: dict[str, Any], row: dict[str, str]) -> Line:
    name = f"{row['dataset']} {row['metric']}, {row['protocol']} rule, {record['n_samples']} questions"
    benchmark, samples, predictions = answers(config, row["protocol"])
    if benchmark is None:
        return not_run(name, "this benchmark has one rule, and it is the other one", row["value"], row["source"])
    value = score(benchmark, samples, predictions, row["metric"])
    if value is None:
        return not_run(name, f"the subset gives no {row['metric']}", row["value"], row["source"])
    expected = float(row["value"])
    half = interval(benchmark, samples, predictions, row["metric"], expected)
    rounding = 0.5 * 10.0 ** -len(row["value"].partition(".")[2])
    passed = abs(value - expected) <= half + rounding
    return check(name, passed, row["value"], f"{value:.4g}", f"{half:.2g}: 95 % interval of the subset", row["source"])


def answers(config: dict[str, Any], protocol: str) -> tuple[Benchmark | None, list[Sample], list[str | None]]:
    """The stored answers of a finished cell, with the benchmark that scores them by a protocol."""
    options = config["dataset"]["benchmark"]
    if "scoring" in options:
        options = options | {"scoring": protocol}
    elif protocol != "llava":
        return None, [], []
    benchmark = build.benchmark(config | {"dataset": config["dataset"] | {"benchmark": options}})
    rows = {row["id"]: row for row in Cell(config).rows()}
    samples = [sample for sample in benchmark.samples() if sample.id in rows]
    return benchmark, samples, [rows[sample.id]["prediction"] for sample in samples]


def score(
    benchmark: Benchmark, samples: Sequence[Sample], predictions: Sequence[str | None], metric: str
) -> float | None:
    return benchmark.metrics(samples, predictions, benchmark.score(samples, predictions)).get(metric)


def interval(
    benchmark: Benchmark,
    samples: Sequence[Sample],
    predictions: Sequence[str | None],
    metric: str,
    expected: float,
) -> float:
    """Half width of the 95 % interval of a subset's score: the larger of bootstrap and, for a share, binomial.

    The binomial interval uses the expected score, so it is not 0 if all answers of the subset are right.
    """
    half = Z * standard_error(benchmark, samples, predictions, metric)
    full = 100 if "accuracy" in metric else 1 if metric in ("f1", "yes_rate") else None
    if full is None:
        return half
    share = expected / full
    return max(half, full * Z * (share * (1 - share) / len(samples)) ** 0.5)


def standard_error(
    benchmark: Benchmark, samples: Sequence[Sample], predictions: Sequence[str | None], metric: str, draws: int = 200
) -> float:
    """Standard error of any metric, by bootstrap over whole images."""
    images: dict[str, list[int]] = {}
    for k, sample in enumerate(samples):
        images.setdefault(sample.image_id, []).append(k)
    names, rng, values = list(images), random.Random(0), []
    for _ in range(draws):
        chosen = [k for name in rng.choices(names, k=len(names)) for k in images[name]]
        value = score(benchmark, [samples[k] for k in chosen], [predictions[k] for k in chosen], metric)
        if value is not None:
            values.append(value)
    return stdev(values)


def check_paper(
    compose: Callable[[list[str]], dict[str, Any]], run: Callable[[dict[str, Any]], Any], model: str
) -> Iterator[Line]:
    """Lines for every number of the paper for these methods and budgets."""
    printed = [
        row
        for row in read(PAPER)
        if row["model"] == model
        and row["method"] in PAPER_METHODS
        and row["keep"] in map(str, PAPER_BUDGETS)
        and row["table"] in ("table1", "table10")
        and not row["setting"]
    ]
    seen = set()
    for row in printed:
        key = (row["dataset"], row["method"], row["keep"], row["metric"])
        if row["dataset"] not in datasets(model) or key in seen:
            continue
        seen.add(key)
        config = compose_cell(compose, row["dataset"], row["method"], row["keep"])
        name = f"{row['method']} at {row['keep']}: {row['dataset']} {row['metric']}"
        source = f"the paper, {row['table']}" + (f" ({row['note']})" if row["note"] else "")
        try:
            record = run(config)
        except (BenchmarkError, InputError) as error:
            yield not_run(name, str(error), row["value"], source)
            continue
        value = record["metrics"].get(row["metric"])
        if value is None:
            yield not_run(name, f"the subset gives no {row['metric']}", row["value"], source)
            continue
        benchmark, samples, predictions = answers(config, "llava")
        assert benchmark is not None  # every benchmark has that protocol
        half = interval(benchmark, samples, predictions, row["metric"], float(row["value"]))
        difference = value - float(row["value"])
        consistent = abs(difference) <= half
        found = f"{value:.4g}, {difference:+.2g}: {'consistent' if consistent else 'not consistent'}"
        yield check(name, consistent, row["value"], found, f"{half:.2g}: 95 % interval of the subset", source)
    missing = [
        (m, k) for m in PAPER_METHODS for k in PAPER_BUDGETS if not any((s[1], s[2]) == (m, str(k)) for s in seen)
    ]
    for method, keep in missing:
        yield not_run(f"{method} at {keep}", "the paper prints no accuracy of it for this model", source="paper.csv")
