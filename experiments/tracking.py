"""Weights & Biases logging, if enabled: config, metrics, times, mask image, predictions."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from experiments.results import Cell


class Tracker:
    """A W&B run for one cell, or none. An error does not stop the evaluation: it is a warning and in the record."""

    def __init__(self, logger: dict[str, Any], cell: Cell):
        self.name, self.cell = logger["name"], cell
        self.run: Any = None
        self.problem: str | None = None
        if self.name != "none":
            self._try(lambda: self._start(logger))

    def report(self, record: dict[str, Any]) -> dict[str, Any]:
        """Send the record and close the run. Returns the entry ``reported`` of the record."""
        if self.name == "none":
            return {}
        if self.run is not None:
            self._try(lambda: self._send(record))
        self.close(failed=False)
        return {"reported": {self.name: self.problem}}

    def close(self, failed: bool) -> None:
        if self.run is not None:
            self._try(lambda: self.run.finish(exit_code=int(failed)))
            self.run = None

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as error:
            self.problem = " ".join(str(error).split())[:200] or type(error).__name__
            print(f"warning: nothing is reported to {self.name}: {self.problem}", file=sys.stderr)
            self.run = None

    def _start(self, logger: dict[str, Any]) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or logger["mode"]
        if mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("there is no key: run wandb login, or set logger.mode=offline")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or logger["project"],
            entity=os.environ.get("WANDB_ENTITY") or logger["entity"],
            mode=mode,
            group=os.environ.get("WANDB_RUN_GROUP") or logger["group"] or "/".join(map(str, self._group())),
            name=f"{self.cell.cell['pruner']} {self.cell.path.name}",
            id=self.cell.id if mode == "online" else None,
            resume="allow" if mode == "online" else None,
            dir=str(self.cell.path),
            config=self.cell.config,
        )

    def _group(self) -> tuple[str, str]:
        return self.cell.cell["model"], self.cell.cell["dataset"]

    def _send(self, record: dict[str, Any]) -> None:
        import wandb

        latency = {f"latency_ms/{stage}": ms for stage, ms in (record["latency_ms"] or {}).items()}
        tokens = {f"tokens/{key}": n for key, n in (record["tokens"] or {}).items() if key != "per_layer"}
        self.run.summary.update({**record["metrics"], **latency, **tokens})
        columns = ["id", "task", "question", "answer", "prediction", "correct"]
        rows = [[str(row[c]) if c == "answer" else row[c] for c in columns] for row in self.cell.rows()]
        log: dict[str, Any] = {"predictions": wandb.Table(columns=[*columns], data=rows)}
        if (self.cell.path / "masks.png").exists():
            log["masks"] = wandb.Image(str(self.cell.path / "masks.png"))
        self.run.log(log)


@contextmanager
def track(logger: dict[str, Any], cell: Cell) -> Iterator[Tracker]:
    """A tracker for one cell, which is always closed."""
    tracker = Tracker(logger, cell)
    try:
        yield tracker
    finally:
        tracker.close(failed=True)
