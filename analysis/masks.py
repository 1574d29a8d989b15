"""Draws the kept tokens of a pruner over the image, and the word with the highest PMI for each patch.

    python -m analysis.masks results/demo_llava/demo/*/keep=16*                 # pruners side by side (Fig. 5)
    python -m analysis.masks RECORD ... --samples 4 --out masks.pdf
    python -m analysis.masks results/demo_llava/demo/{mi,random}/* --dialogue   # budgets by pruners (Fig. 1, 7)

Each argument is the folder of a finished cell. Images come from the benchmark of the record. Records do not contain the
PMI of words and patches: `python run.py task=heat cell=FOLDER` loads the model again and draws it.
"""

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import pvariance
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from analysis.command import arguments
from experiments import build
from experiments.benchmarks.base import Benchmark, BenchmarkError, SampleError
from experiments.explorer.panels import NOTHING
from experiments.results import read_answers
from mipruner.errors import InputError

DIM = 0.82
"""Share of white in a dropped patch."""
SIDE = 1000
"""Longer side of a drawn image in pixels; a panel is 275 pixels wide."""
RIGHT, WRONG = "#0072B2", "#D55E00"
WORD_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00")


def thumbnail(image: Image.Image) -> Image.Image:
    """RGB copy [height, width] of at most `SIDE` pixels."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    return small


def overlay(image: Image.Image, box: Sequence[float], grid: Sequence[int], kept: Sequence[int]) -> Image.Image:
    """Thumbnail of the image with faded dropped patches in ``box``, in pixels of the original image."""
    small = thumbnail(image)
    rows, columns = grid[-2:]
    mask = np.zeros(rows * columns, dtype=np.uint8)
    mask[[k % (rows * columns) for k in kept]] = 255
    left, top, right, bottom = (
        round(edge * short / long) for edge, short, long in zip(box, 2 * small.size, 2 * image.size, strict=True)
    )
    size = max(1, right - left), max(1, bottom - top)
    patches = Image.fromarray(mask.reshape(rows, columns)).resize(size, Image.Resampling.NEAREST)
    shown = Image.new("L", small.size, 0)
    shown.paste(patches, (left, top))
    faded = Image.blend(small, Image.new("RGB", small.size, "white"), DIM)
    return Image.composite(small, faded, shown)


WordPmi = Callable[[dict[str, Any], Benchmark, str], tuple[list[str], np.ndarray]]
ReadCell = tuple[dict[str, Any], dict[str, dict[str, Any]]]
"""The record of a cell, and its rows by sample id."""


def read_cell(path: Path) -> ReadCell:
    """The record of a finished cell and its rows by sample id. Raises ValueError with the folder if there is none."""
    try:
        record = json.loads((path / "record.json").read_text(encoding="utf-8"))
        rows = read_answers(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is no folder of a finished cell: it has no {Path(error.filename).name}") from error
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no folder of a finished cell: {error}") from error
    if "server" in record:
        raise ValueError(f"{path} was answered by a server, which does not tell which tokens it kept")
    return record, {row["id"]: row for row in rows}


def in_lines(text: str, width: int) -> str:
    """Break text into at most eight lines."""
    return "\n".join(textwrap.wrap(text, width, max_lines=8, placeholder=" …"))


def is_drawable(row: dict[str, Any]) -> bool:
    """Whether the sample was answered and its tokens form a grid."""
    return "error" not in row and None not in row["grids"]


def shared(answered: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    """Ids of the samples that can be drawn in each cell."""
    return [name for name in answered[0] if all(name in rows and is_drawable(rows[name]) for rows in answered)]


def choose(rows: Sequence[dict[str, Any]], n: int) -> list[str]:
    """Ids of ``n`` samples whose tokens form a grid, from different images and tasks if possible."""
    usable = [row for row in rows if is_drawable(row)]
    chosen: list[dict[str, Any]] = []
    while usable and len(chosen) < n:
        tasks = [row["task"] for row in chosen]
        images = {row["image_id"] for row in chosen}
        best = min(usable, key=lambda row: (row["image_id"] in images, tasks.count(row["task"])))
        usable.remove(best)
        chosen.append(best)
    return [row["id"] for row in chosen]


def disagreements(answered: Sequence[dict[str, dict[str, Any]]], n: int) -> list[str]:
    """Ids of the samples whose scores vary most between cells, from different images and tasks if possible."""
    spread = {one: pvariance([rows[one]["correct"] or 0.0 for rows in answered]) for one in shared(answered)}
    ranked = sorted((sample for sample in spread if spread[sample] > 0), key=lambda sample: -spread[sample])
    return choose([answered[0][sample] for sample in ranked[: 8 * n]], n)


@contextmanager
def plain_text() -> Iterator[None]:
    """A context, or decorator, in which dollars in texts are dollars."""
    with plt.rc_context({"text.parse_math": False}):
        yield


def draw_kept(axis, image: Image.Image, record: dict[str, Any], row: dict[str, Any]) -> str:
    """Draw the kept tokens of one answer. Returns the pruner and the number of tokens."""
    axis.imshow(overlay(image, row["boxes"][0], row["grids"][0], row["kept"][0]))
    return f"{record['cell']['pruner']}, {len(row['kept'][0])} of {row['n_visual']}"


@plain_text()
def draw(read: Sequence[ReadCell], benchmark, samples: Sequence[str], out: Path) -> None:
    """Draw for each sample the full image, then one panel per cell. Titles of right answers are blue, of wrong ones
    orange.
    """
    width = 1 + len(read)
    per_line = max(1, 6 // width)
    lines = -(-len(samples) // per_line)
    size = (2.5 * width * per_line, 3.1 * lines)
    figure, axes = plt.subplots(lines, width * per_line, figsize=size, squeeze=False)
    for k, sample in enumerate(samples):
        line = axes[k // per_line, k % per_line * width :]
        first = read[0][1][sample]
        image = benchmark.images(first["image_id"])[0]
        line[0].imshow(thumbnail(image))
        question = in_lines(first["question"], 36)
        line[0].set_title(f"{question}\nanswer: {answer_text(first['answer'])}", fontsize=8, loc="left")
        for axis, (record, rows) in zip(line[1:], read, strict=False):
            row = rows[sample]
            title = f"{draw_kept(axis, image, record, row)}\n{in_lines(said(row), 36)}"
            axis.set_title(title, fontsize=8, loc="left", color=RIGHT if is_right(row) else WRONG)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    save(figure, out, dpi=110)


@plain_text()
def draw_dialogue(read: Sequence[ReadCell], benchmark, sample: str, out: Path) -> None:
    """Draw one question: the full image, then columns of pruners and rows of budgets, with the answers."""
    pruners = list(dict.fromkeys(record["cell"]["pruner"] for record, _ in read))
    budgets = list(dict.fromkeys(record["cell"]["keep"] for record, _ in read))
    first = read[0][1][sample]
    image = benchmark.images(first["image_id"])[0]
    size = (2.3 * (1 + len(pruners)), 2.9 * len(budgets))
    figure, axes = plt.subplots(len(budgets), 1 + len(pruners), figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].imshow(thumbnail(image))
    axes[0, 0].set_title(in_lines(first["question"], 30), fontsize=9, loc="left")
    caption(axes[0, 0], f"answer: {answer_text(first['answer'])}")
    for record, rows in read:
        row = rows[sample]
        axis = axes[budgets.index(record["cell"]["keep"]), 1 + pruners.index(record["cell"]["pruner"])]
        axis.set_title(draw_kept(axis, image, record, row), fontsize=8, loc="left")
        caption(axis, said(row), RIGHT if is_right(row) else WRONG)
    figure.tight_layout()
    save(figure, out, dpi=130)


def save(figure, out: Path, **options) -> None:
    """Write a figure and close it. Use .jpg for large figures, because noisy images make a PNG large."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, **options, **({"pil_kwargs": {"quality": 90}} if out.suffix == ".jpg" else {}))
    plt.close(figure)


def caption(axis, text: str, colour: str = "black") -> None:
    """Text below an image, cut after four lines."""
    lines = textwrap.wrap(text, 34, max_lines=4)
    axis.text(0, -0.04, "\n".join(lines), transform=axis.transAxes, fontsize=8, va="top", color=colour)


def patch_image(values: np.ndarray, grid: Sequence[int], box: Sequence[float]) -> dict[str, Any]:
    """Arguments of ``imshow`` for an overlay with one value or colour per patch."""
    left, top, right, bottom = box
    return {"X": values.reshape(*grid[-2:], *values.shape[1:]), "extent": (left, right, bottom, top)}


@plain_text()
def draw_heat(
    cell: Path, word_pmi: WordPmi, out: Path, n: int = 3, ids: Sequence[str] | None = None, words: Sequence[str] = ()
) -> None:
    """Draw for each sample the image, the PMI of each word on one scale, and the kept patches by pivot word.

    The pivot word of a patch has the highest PMI, which is the relevance of the patch (eq. 19). Without ``words``, the
    pivot words of most kept patches are shown.

    Parameters
    ----------
    word_pmi : callable
        Takes the config of the cell, its benchmark and a sample id. Returns the words of T and their PMI [n_visual,
        n_text].
    n, ids
        Number of samples, or their ids.

    Raises
    ------
    ValueError
        If it is not a finished cell, or has no such sample or word.
    """
    ((record, rows),), benchmark, samples = choose_samples([cell], ids, n)
    maps = {sample: word_pmi(record["config"], benchmark, sample) for sample in samples}
    chosen = {sample: shown_words(*maps[sample], rows[sample]["kept"][0], words) for sample in samples}
    width = 2 + max(map(len, chosen.values()))
    size = (1.7 * width, 2.4 * len(samples))
    figure, axes = plt.subplots(len(samples), width, figsize=size, squeeze=False, layout="constrained")
    for line, sample in zip(axes, samples, strict=True):
        row, (texts, pmi) = rows[sample], maps[sample]
        image = benchmark.images(row["image_id"])[0]
        small, whole = thumbnail(image), (0, image.width, image.height, 0)
        over = {"grid": row["grids"][0], "box": row["boxes"][0]}
        for axis in line:
            axis.axis("off")
        last = line[1 + len(chosen[sample])]
        for axis in line[: 2 + len(chosen[sample])]:
            shown = small if axis is line[0] else small.convert("L")
            axis.imshow(shown, cmap="gray", vmin=-400 * (axis is last), vmax=255, extent=whole)
            axis.set(xlim=(0, image.width), ylim=(image.height, 0))
        line[0].set_title(in_lines(row["question"], 22), fontsize=7, loc="left")
        for axis, j in zip(line[1:], chosen[sample], strict=False):
            heat = axis.imshow(**patch_image(pmi[:, j], **over), cmap="inferno", vmin=0, vmax=pmi.max(), alpha=0.7)
            axis.set_title(texts[j].strip(), fontsize=8, loc="left")
        colours = np.zeros((len(pmi), 4))
        pivot = pmi.argmax(1)
        for colour, j in zip(WORD_COLOURS, chosen[sample], strict=False):
            mine = [k for k in row["kept"][0] if pivot[k] == j]
            colours[mine] = matplotlib.colors.to_rgba(colour)
            last.plot([], [], "s", color=colour, label=texts[j].strip())
        others = [k for k in row["kept"][0] if pivot[k] not in chosen[sample]]
        colours[others] = matplotlib.colors.to_rgba("black")
        last.imshow(**patch_image(colours, **over))
        last.set_title(f"kept {len(row['kept'][0])}, by word\n{in_lines(said(row), 36)}", fontsize=8, loc="left")
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": 2}
        last.legend(**place, fontsize=6, frameon=False, handletextpad=0, columnspacing=0.4).set_in_layout(False)
        scale = figure.colorbar(heat, ax=line[0], location="bottom", fraction=0.05, pad=0.04)
        scale.ax.tick_params(labelsize=6)
        scale.set_label("PMI", fontsize=7)
    figure.set_layout_engine("constrained", h_pad=0.15)
    save(figure, out, dpi=130, bbox_inches="tight")


def shown_words(texts: Sequence[str], pmi: np.ndarray, kept: Sequence[int], words: Sequence[str]) -> list[int]:
    """Indices in T of the given words, or of up to six pivot words of most kept patches, in reading order.

    Raises
    ------
    ValueError
        If a word is not in the question.
    """
    plain = [text.strip() for text in texts]
    if missing := [word for word in words if word not in plain]:
        raise ValueError(f"{', '.join(missing)} is not among the text tokens {' '.join(plain)}")
    if words:
        return [j for j, word in enumerate(plain) if word in words]
    counts = np.bincount(pmi[list(kept)].argmax(1), minlength=len(texts))
    return sorted(j for j in np.argsort(-counts, kind="stable")[:6].tolist() if counts[j])


def said(row: dict[str, Any]) -> str:
    return row["prediction"] or NOTHING


def is_right(row: dict[str, Any]) -> bool:
    return row["correct"] is not None and row["correct"] >= 0.5


def answer_text(answer: Any) -> str:
    return str(max(set(answer), key=answer.count) if isinstance(answer, list) else answer)


def draw_cell(record: dict[str, Any], rows: Sequence[dict[str, Any]], benchmark, out: Path) -> None:
    """Draw samples of one cell, ``n_masks`` of its config."""
    if samples := choose(rows, record["config"]["n_masks"]):
        draw([(record, {row["id"]: row for row in rows})], benchmark, samples, out)


def choose_samples(
    cells: Sequence[Path], ids: Sequence[str] | None, n: int
) -> tuple[list[ReadCell], Benchmark, Sequence[str]]:
    """The cells, their benchmark, and sample ids: the given ones or n others. Raises ValueError for an unknown cell or
    sample.
    """
    read = [read_cell(cell) for cell in cells]
    answered = [rows for _, rows in read]
    for cell, rows in zip(cells, answered, strict=True):
        if unknown := set(ids or ()) - rows.keys():
            raise ValueError(f"{cell} has no sample {', '.join(sorted(unknown))}; the first is {next(iter(rows))}")
    drawable = shared(answered)
    if failed := set(ids or ()) - set(drawable):
        raise ValueError(f"{', '.join(sorted(failed))}: failed, or its tokens lie on no grid")
    if not drawable:
        raise ValueError("the cells share no sample that can be drawn: give cells of the same dataset and limit")
    benchmark = build.benchmark(read[0][0]["config"])
    return read, benchmark, ids or choose([answered[0][name] for name in drawable], n)


def main() -> None:
    parser = arguments(__doc__, out="masks.png")
    parser.add_argument("cells", nargs="+", type=Path, metavar="CELL", help="folder of a finished cell")
    parser.add_argument("--samples", type=int, default=4, help="how many samples (default: 4)")
    parser.add_argument("--ids", nargs="*", help="these samples instead, by their ids")
    parser.add_argument("--dialogue", action="store_true", help="one sample: a column a pruner, a row a budget")
    args = parser.parse_args()
    try:
        read, benchmark, samples = choose_samples(args.cells, args.ids, args.samples)
        if args.dialogue:
            found = [] if args.ids else disagreements([rows for _, rows in read], 1)
            draw_dialogue(read, benchmark, (found or samples)[0], args.out)
        else:
            draw(read, benchmark, samples, args.out)
    except (ValueError, OSError, InputError, BenchmarkError, SampleError) as error:
        parser.exit(2, f"{error}\n")
    print(args.out)


if __name__ == "__main__":
    main()
