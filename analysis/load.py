"""Everything that was measured, and everything that the paper prints, as pandas frames.

`cells` has one row per result record (the record is described in experiments/results.py), `paper` one row per number.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

HERE = Path(__file__).parent
CONF = HERE.parent / "conf"

COMPARED = ("model", "dataset", "pruner", "decoding", "positions", "text_scope")
"""The parts of a config in which two cells of the same name can differ."""

WHERE = ("path", "hub", "revision", "seed")
"""Keys that say where something comes from, or have a column of their own."""


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
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            config = compose("config", [f"model={model}", f"dataset={dataset}", f"pruner={pruner}"])
    except MissingConfigException:
        return {}
    return settings(OmegaConf.to_container(config, resolve=True))


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What of a resolved config can change a number, apart from names, budget, seed and number of samples."""
    compared = flat({key: config[key] for key in COMPARED if key in config})
    return {key: value for key, value in compared.items() if key.split(".")[-1] not in WHERE and ".hub." not in key}


def read_record(path: Path) -> dict[str, Any]:
    """One cell as a flat row. Raises ValueError, naming the file, if it is not a finished record."""
    try:
        record = json.loads(path.read_text())
        cell, tokens = record["cell"], record["tokens"] or {}
        used = settings(record["config"])
        default = default_settings(cell["model"], cell["dataset"], cell["pruner"]) or used
        row = {
            "model": cell["model"],
            "dataset": cell["dataset"],
            "method": cell["pruner"],
            "keep": str(cell["keep"]),
            "seed": cell["seed"],
            "settings": {key.split(".")[-1]: value for key, value in used.items()},
            "differs": {key.split(".")[-1] for key in {*used, *default} if used.get(key) != default.get(key)},
            "config": record["config"],
            "n_samples": record["n_samples"],
            "n_failed": len(record["failed"]),
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
        row["metrics"] |= {"latency_ms" if k == "total" else f"{k}_latency_ms": ms for k, ms in latency.items()}
        row["metrics"] |= {"peak_memory_gib": record["peak_memory_gib"]}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        message = f"{path} is not a finished record ({error!r}): delete its folder and run the cell again"
        raise ValueError(message) from error
    return row


def cells(results: str | Path = "results") -> pd.DataFrame:
    """One row per finished cell under ``results``; none if there is no such folder."""
    rows = [read_record(path) for path in sorted(Path(results).glob("*/*/*/*/record.json"))]
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
