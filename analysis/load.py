"""Loads all measured numbers and all numbers printed in the paper as pandas frames.

`cells` has one row per result record, `paper` one row per number. The records are described in experiments/results.py
and task=efficiency.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from experiments.conf import ABOUT, CONF
from experiments.results import NOT_IDENTITY, parse_method

HERE = Path(__file__).parent

EFFICIENCY = "efficiency"
"""Folder and dataset of what task=efficiency measures."""

COMPARED = ("model", "dataset", "pruner", "decoding", "positions", "text_scope", "quality", "keep_max")
"""The parts of a config in which two cells of the same name can differ."""

WHERE = ("path", "hub", "revision", "device_map", "digest")
"""Keys that say where something comes from, or where it lies."""

SEEDS = ("pruner.seed", "decoding.seed")
"""Keys that repeat the cell's seed, which has a column of its own; a dataset's seed makes other questions."""


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as {"pruner.lam": 1.0, ...}."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        key: value for name, part in config.items() for key, value in flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }


@cache
def default_settings(model: str, dataset: str, pruner: str) -> dict[str, Any]:
    """The settings of `python run.py model=... dataset=... pruner=...`; none if conf/ has not all of these names."""
    if not all(re.fullmatch(r"[\w.-]+", str(name)) for name in (model, dataset, pruner)):
        return {}  # nothing that a record says is read as more than a name
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            config = compose("config", [f"model={model}", f"dataset={dataset}", f"pruner={pruner}"])
    except MissingConfigException:
        return {}
    return settings(OmegaConf.to_container(config, resolve=True))


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a resolved config that can change a number, without names, budget, seed and number of samples."""
    compared = flat({key: config[key] for key in COMPARED if key in config})
    return {
        key: value
        for key, value in compared.items()
        if key not in SEEDS and not {*WHERE, *NOT_IDENTITY, *ABOUT} & {*key.split(".")}
    }


def read_record(path: Path) -> dict[str, Any]:
    """One cell as a flat row. Raises ValueError, naming the file, if it is not a finished record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        cell, tokens = record["cell"], record["tokens"] or {}
        used = settings(record["config"])
        default = default_settings(cell["model"], cell["dataset"], cell["pruner"]) or used
        used = default | used  # a record older than an option was made with its default
        row = {
            "model": cell["model"],
            "dataset": cell["dataset"],
            "method": cell["pruner"],
            "keep": str(cell["keep"]),
            "seed": cell["seed"],
            "settings": {key.split(".")[-1]: value for key, value in used.items()},
            "differs": {key.split(".")[-1] for key in used if used[key] != default.get(key)},
            "config": record["config"],
            "n_samples": record["n_samples"],
            "n_failed": len(record["failed"]),
            "n_skipped": len(record.get("skipped", ())),
            "n_empty": record.get("unusable", {}).get("empty", 0),
            "n_unreadable": record.get("unusable", {}).get("unreadable", 0),
            "scored": bool(record["metrics"]),
            "n_visual": tokens.get("visual"),
            "n_kept": tokens.get("kept"),
            "layer_mean": tokens.get("layer_mean"),
            "batch_size": record["batch_size"],
            "device": record["device"],
            "git_commit": record["git_commit"],
            "command": record["command"],
            "finished": record["finished"],
            "path": path.parent,
            "metrics": dict(record["metrics"]),
            "standard_errors": dict(record["standard_errors"]),
        }
        latency = record["latency_ms"] or {}
        row["metrics"] |= {f"{stage}_ms_in_batches": ms for stage, ms in latency.items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        message = f"{path} is not a finished record ({error!r}): delete its folder and run the cell again"
        raise ValueError(message) from error
    return row


def read_costs(path: Path) -> list[dict[str, Any]]:
    """What task=efficiency measured on the pipeline engine, which runs every method, as rows like a cell's.

    The latency is the median over the repetitions, its error half the range from the 20th to the 80th percentile.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for row in record["rows"]:
        if row["engine"] != "pipeline":
            continue
        method, settings = parse_method(row["method"])
        stages = {f"{stage}_latency_ms": ms["median"] for stage, ms in row["latency_ms"].items() if stage != "total"}
        total = row["latency_ms"]["total"]
        keep = row["keep"]
        rows.append(
            {
                "model": record["model"],
                "dataset": EFFICIENCY,
                "method": method,
                "keep": str(keep),
                "seed": 0,
                "settings": settings,
                "differs": set(settings),
                "n_samples": record["repetitions"],
                "n_failed": 0,
                "n_skipped": 0,
                "n_empty": 0,
                "n_unreadable": 0,
                "scored": True,
                "n_visual": row["visual_tokens"],
                "n_kept": keep if isinstance(keep, int) else round(keep * row["visual_tokens"]),
                "layer_mean": row["visual_tokens_layer_mean"],
                "batch_size": 1,
                "device": record["machine"]["device"] + (", CPU time" if record["clock"] == "cpu" else ""),
                "git_commit": record["git_commit"],
                "command": record["command"],
                "finished": record["date"],
                "path": path,
                "metrics": {"latency_ms": total["median"], "peak_memory_gib": row["peak_memory_gib"]} | stages,
                "standard_errors": {"latency_ms": (total["p80"] - total["p20"]) / 2},
            }
        )
    return rows


def cells(results: str | Path = "results") -> pd.DataFrame:
    """One row per finished cell under ``results``, then one per cost that was measured there; none if nothing is there.

    Costs have the dataset `EFFICIENCY`.
    """
    rows = [read_record(path) for path in sorted(Path(results).glob("*/*/*/*/record.json"))]
    rows += [row for path in sorted(Path(results).glob(f"{EFFICIENCY}/*.json")) for row in read_costs(path)]
    return pd.DataFrame(rows, columns=None if rows else ["model", "dataset", "method", "keep"])


def paper() -> pd.DataFrame:
    """Every number printed in the paper's Tables 1-11, in print order.

    ``printed`` is the number as printed, ``value`` the same as a float, ``notes`` the keys of `paper_notes`.
    """
    frame = pd.read_csv(HERE / "paper.csv", dtype=str, keep_default_na=False)
    frame["printed"] = frame["value"]
    frame["value"] = frame["value"].astype(float)
    frame["spread"] = pd.to_numeric(frame["spread"])
    frame["notes"] = frame.pop("note").str.split()
    return frame


def paper_notes() -> dict[str, str]:
    """What is wrong or contested about a printed number, by key."""
    return pd.read_csv(HERE / "paper_notes.csv", index_col="note")["explanation"].to_dict()
