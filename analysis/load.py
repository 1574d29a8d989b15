"""Loads all measured numbers and all numbers of the paper as pandas frames.

`cells` has one row per record, `paper` one row per number. See experiments/results.py and
experiments/tasks/efficiency.py for the records.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, cast

import pandas as pd
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from experiments.conf import ABOUT, CONF
from experiments.results import NOT_IDENTITY, parse_method

HERE = Path(__file__).parent

EFFICIENCY = "efficiency"
"""Folder and dataset name of the results of task=efficiency."""

COMPARED = ("model", "dataset", "pruner", "decoding", "positions", "text_scope", "quality", "keep_max")
"""Parts of a config that can differ between cells of the same name."""

WHERE = ("path", "hub", "revision", "device_map", "digest")
"""Keys of sources and paths."""

SEEDS = ("pruner.seed", "decoding.seed")
"""Keys with the seed of the cell, which has its own column. (The seed of a dataset changes the questions.)"""


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested config to {"pruner.lam": 1.0, ...}."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        key: value for name, part in config.items() for key, value in flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }


@cache
def default_settings(model: str, dataset: str, pruner: str) -> dict[str, Any]:
    """Settings of `python run.py model=... dataset=... pruner=...`; empty if conf/ does not have all of these names."""
    if not all(re.fullmatch(r"[\w.-]+", str(name)) for name in (model, dataset, pruner)):
        return {}  # nothing that a record says is read as more than a name
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            config = compose("config", [f"model={model}", f"dataset={dataset}", f"pruner={pruner}"])
    except MissingConfigException:
        return {}
    return settings(cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)))


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Values of a resolved config that can change a number, without names, budget, seed and number of samples."""
    compared = flat({key: config[key] for key in COMPARED if key in config})
    return {
        key: value
        for key, value in compared.items()
        if key not in SEEDS and not {*WHERE, *NOT_IDENTITY, *ABOUT} & {*key.split(".")}
    }


def read_record(path: Path) -> dict[str, Any]:
    """A cell as a flat row. Raises ValueError with the file if it is not a finished record."""
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
    """Results of task=efficiency for the pipeline engine, as rows like those of cells.

    Latency is the median over repetitions. Its error is half of the range from the 20th to the 80th percentile.
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
                **dict.fromkeys(("n_failed", "n_skipped", "n_empty", "n_unreadable"), 0),
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
    """One row per finished cell under ``results``, then one row per measured cost; no rows if nothing is there.

    Costs have the dataset `EFFICIENCY`.
    """
    rows = [read_record(path) for path in sorted(Path(results).glob("*/*/*/*/record.json"))]
    rows += [row for path in sorted(Path(results).glob(f"{EFFICIENCY}/*.json")) for row in read_costs(path)]
    return pd.DataFrame(rows, columns=None if rows else ["model", "dataset", "method", "keep"])


def paper() -> pd.DataFrame:
    """All numbers of the paper's Tables 1-11, in print order.

    ``printed`` is the number as text, ``value`` the float, ``notes`` the keys of `paper_notes`.
    """
    frame = pd.read_csv(HERE / "paper.csv", dtype=str, keep_default_na=False)
    frame["printed"] = frame["value"]
    frame["value"] = frame["value"].astype(float)
    frame["spread"] = pd.to_numeric(frame["spread"])
    frame["notes"] = frame.pop("note").str.split()
    return frame


def paper_notes() -> dict[str, str]:
    """Notes about wrong or doubtful numbers of the paper, by key."""
    return pd.read_csv(HERE / "paper_notes.csv", index_col="note")["explanation"].to_dict()
