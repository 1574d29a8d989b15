"""Weights & Biases, if asked for: config, metrics, timing, mask picture, predictions. Offline without an account."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from experiments.results import Cell

Report = Callable[[dict[str, Any]], None]


@contextmanager
def track(logger: dict[str, Any], cell: Cell) -> Iterator[Report]:
    """A run of its own for one cell, closed whatever happens. Yields the function that takes the finished record."""
    if logger["name"] == "none":
        yield lambda record: None
        return
    import wandb

    run = wandb.init(
        project=logger["project"],
        entity=logger["entity"],
        mode=logger["mode"],
        group=logger["group"] or f"{cell.cell['model']}/{cell.cell['dataset']}",
        name=f"{cell.cell['pruner']} {cell.path.name}",
        id=cell.id if logger["mode"] == "online" else None,
        resume="allow" if logger["mode"] == "online" else None,
        dir=str(cell.path),
        config=cell.config,
    )

    def report(record: dict[str, Any]) -> None:
        run.summary.update(
            {**record["metrics"], **{f"latency_ms/{k}": v for k, v in (record["latency_ms"] or {}).items()}}
        )
        run.summary.update({f"tokens/{k}": v for k, v in (record["tokens"] or {}).items() if k != "per_layer"})
        columns = ["id", "task", "question", "answer", "prediction", "correct"]
        rows = [[str(row[c]) if c == "answer" else row[c] for c in columns] for row in cell.rows()]
        log = {"predictions": wandb.Table(columns=columns, data=rows)}
        if (cell.path / "masks.png").exists():
            log["masks"] = wandb.Image(str(cell.path / "masks.png"))
        run.log(log)

    failed = True
    try:
        yield report
        failed = False
    finally:
        run.finish(exit_code=int(failed))
