"""Published scores of unpruned models with their sources, from published.csv."""

import csv
from pathlib import Path


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file as dicts."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


PUBLISHED = read(Path(__file__).with_name("published.csv"))


def published(model: str, dataset: str) -> list[dict[str, str]]:
    """Rows of published.csv for one model and dataset."""
    return [row for row in PUBLISHED if (row["model"], row["dataset"]) == (model, dataset)]
