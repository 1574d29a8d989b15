"""Everything that was measured, and everything that the paper prints, as pandas frames.

`cells` has one row per result record (the record is described in experiments/results.py), `paper` one row per number.
"""

import json
import re
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent

CELL_DIRECTORY = re.compile(r"keep=(?P<keep>[^,]+?)(?P<differs>(,[^,=]+=[^,]*?)*)-(?P<id>[0-9a-f]+)")


def read_record(path: Path) -> dict:
    """One cell as a flat row. Raises ValueError, naming the file, if it is not a finished record."""
    try:
        record = json.loads(path.read_text())
        cell, tokens = record["cell"], record["tokens"]
        named = CELL_DIRECTORY.fullmatch(path.parent.name)
        differs = dict(part.split("=", 1) for part in named["differs"].split(",") if part)
        differs.pop("seed", None)
        row = {
            "model": cell["model"],
            "dataset": cell["dataset"],
            "method": cell["pruner"],
            "keep": named["keep"],
            "seed": cell["seed"],
            "differs": differs,
            "config": record["config"],
            "n_samples": record["n_samples"],
            "n_failed": len(record["failed"]),
            "n_visual": tokens["visual"],
            "n_kept": tokens["kept"],
            "layer_mean": tokens["layer_mean"],
            "batch_size": record["batch_size"],
            "device": record["device"],
            "git_commit": record["git_commit"],
            "command": record["command"],
            "finished": record["finished"],
            "path": path.parent,
            "metrics": dict(record["metrics"]),
            "standard_errors": dict(record["standard_errors"]),
        }
        latency = {"latency_ms" if k == "total" else f"{k}_latency_ms": v for k, v in record["latency_ms"].items()}
        row["metrics"] |= latency | {"peak_memory_gib": record["peak_memory_gib"]}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a finished record ({error!r}): delete its folder and run the cell again"
        ) from error
    return row


def cells(results: str | Path = "results") -> pd.DataFrame:
    """One row per finished cell under ``results``; none if there is no such folder."""
    rows = [read_record(path) for path in sorted(Path(results).glob("*/*/*/*/record.json"))]
    columns = ["model", "dataset", "method", "keep", "seed", "differs", "config", "metrics", "standard_errors", "path"]
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else columns)


def samples(cell: Path) -> pd.DataFrame:
    """The samples of one cell, in the order in which they were answered."""
    return pd.read_json(cell / "samples.jsonl", lines=True, dtype=False, convert_dates=False)


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
