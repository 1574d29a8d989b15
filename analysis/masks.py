"""What a pruner kept, drawn over the picture: the paper's Fig. 1 and 5.

    python -m analysis.masks results/demo_llava/demo/*/keep=16*           # several pruners side by side
    python -m analysis.masks RECORD ... --samples 4 --out masks.pdf

Each argument is the folder of a finished cell. The pictures come from the benchmark that the record names.
"""

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DIM = 0.82
"""How far a dropped patch fades to white."""


def overlay(image: Image.Image, box: Sequence[float], grid: Sequence[int], kept: Sequence[int]) -> np.ndarray:
    """The picture [height, width, 3] in 0..1 with the dropped patches of ``box`` faded."""
    rows, columns = grid[-2:]
    mask = np.zeros(rows * columns, dtype=np.uint8)
    mask[[k % (rows * columns) for k in kept]] = 255
    left, top, right, bottom = (round(edge) for edge in box)
    patches = Image.fromarray(mask.reshape(rows, columns)).resize(
        (right - left, bottom - top), Image.Resampling.NEAREST
    )
    canvas = Image.new("L", image.size, 0)
    canvas.paste(patches, (left, top))
    shown = np.asarray(canvas, dtype=float)[..., None] / 255
    pixels = np.asarray(image.convert("RGB"), dtype=float) / 255
    return pixels * shown + (pixels * (1 - DIM) + DIM) * (1 - shown)


def read_cell(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The record of a finished cell and its rows by sample id."""
    record = json.loads((path / "record.json").read_text())
    rows = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    return record, {row["id"]: row for row in rows}


def choose(rows: Sequence[dict[str, Any]], n: int) -> list[str]:
    """Ids of ``n`` samples whose tokens lie on a grid, each from another picture and task as far as possible."""
    usable = [row for row in rows if "error" not in row and None not in row["grids"]]
    chosen: list[dict[str, Any]] = []
    while usable and len(chosen) < n:
        tasks = [row["task"] for row in chosen]
        images = {row["image_id"] for row in chosen}
        best = min(usable, key=lambda row: (row["image_id"] in images, tasks.count(row["task"])))
        usable.remove(best)
        chosen.append(best)
    return [row["id"] for row in chosen]


def draw(cells: Sequence[Path], benchmark, samples: Sequence[str], out: Path) -> None:
    """For each sample the whole picture, then one panel a cell; blue titles are right answers, orange ones wrong."""
    read = [read_cell(cell) for cell in cells]
    width = 1 + len(cells)
    per_line = max(1, 6 // width)
    lines = -(-len(samples) // per_line)
    size = (2.5 * width * per_line, 3.1 * lines)
    figure, axes = plt.subplots(lines, width * per_line, figsize=size, squeeze=False)
    for k, sample in enumerate(samples):
        line = axes[k // per_line, k % per_line * width :]
        first = read[0][1][sample]
        image = benchmark.images(first["image_id"])[0]
        line[0].imshow(image)
        question = "\n".join(textwrap.wrap(first["question"], 36))
        line[0].set_title(f"{question}\nanswer: {answer_text(first['answer'])}", fontsize=8, loc="left")
        for axis, (record, rows) in zip(line[1:], read, strict=False):
            row = rows[sample]
            axis.imshow(overlay(image, row["boxes"][0], row["grids"][0], row["kept"][0]))
            right = row["correct"] is not None and row["correct"] >= 0.5
            axis.set_title(
                f"{record['cell']['pruner']}, {len(row['kept'][0])} of {row['n_visual']}\n{row['prediction']}",
                fontsize=8,
                loc="left",
                color="#0072B2" if right else "#D55E00",
            )
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def answer_text(answer: Any) -> str:
    return str(max(set(answer), key=answer.count) if isinstance(answer, list) else answer)


def draw_cell(path: Path, benchmark, n_samples: int) -> None:
    """``masks.png`` of one finished cell."""
    rows = read_cell(path)[1]
    if samples := choose(list(rows.values()), n_samples):
        draw([path], benchmark, samples, path / "masks.png")


def main() -> None:
    from hydra.utils import instantiate

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=4, help="how many")
    parser.add_argument("--ids", nargs="*", help="these samples instead")
    parser.add_argument("--out", type=Path, default=Path("masks.png"))
    args = parser.parse_args()
    record, rows = read_cell(args.cells[0])
    benchmark = instantiate(record["config"]["dataset"]["benchmark"])
    draw(args.cells, benchmark, args.ids or choose(list(rows.values()), args.samples), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
