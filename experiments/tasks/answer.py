"""Answer one question about one image of your own, and write a page that shows the tokens that were kept.

python run.py image=photo.jpg question="What is on the table?" model=llava15_7b keep=64
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from experiments import build
from experiments.explorer import panels, views
from mipruner.errors import InputError
from mipruner.models import Prompt
from mipruner.pipeline import Pipeline
from mipruner.processed import pipeline_of
from mipruner.pruners import PRUNERS
from mipruner.selection import Auto


def open_photo(path: str) -> Image.Image:
    """The image in RGB, upright as the camera held it. Raises `InputError`."""
    if not Path(path).is_file():
        raise InputError(f"no image {path}: give the path of a JPEG or PNG file")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    image, question = config["image"], config["question"]
    config = build.resolve(config)
    if "engine" in config:
        raise InputError("one image of your own needs engine=pipeline: a server does not tell which tokens it kept")
    if not any(override.startswith("decoding.max_new_tokens=") for override in overrides):
        config["decoding"]["max_new_tokens"] = 128  # the dataset's number is for its own answers
    print(answer(config, image, question))


def answer(config: dict[str, Any], image: str | None, question: str | None) -> str:
    """The answer, with tokens and times, and where the page lies that shows it beside the answer to all tokens.

    Raises
    ------
    InputError
        If the image cannot be read or the question is empty.
    """
    if image is None:
        raise InputError("a question needs an image: give image=photo.jpg, too")
    if not str(question or "").strip():
        raise InputError(f'the question about {image} is empty: give question="What is this?", too')
    photo, question = open_photo(image), str(question)
    choices = build.pruner(config), build.budget(config), build.decoding(config)
    for _ in range(2):  # the first warms up
        pipeline = pipeline_of(build.any_model(config), *choices)
        (told,) = pipeline([Prompt(question, [photo])])
    kept, ms = sum(selection.n_rows for selection in told.selections), pipeline.watch.ms
    lines = [
        told.text,
        f"  {config['model']['name']}  {config['pruner']['name']}  tokens kept {kept} of {sum(told.n_visual)}",
        "  ms, once warm: "
        + "  ".join(f"{stage} {spent:.1f}" for stage, spent in (ms | {"total": sum(ms.values())}).items()),
    ]
    if not pipeline.adapter.reads_inside:
        lines.append(f"  no page shows the tokens: a {pipeline.adapter.model.config.model_type} has no adapter here")
        return "\n".join(lines)
    out = Path(config["results"]) / "answers"
    out.mkdir(parents=True, exist_ok=True)
    out /= f"{Path(image).stem},{config['model']['name']},{config['pruner']['name']},keep={config['keep']}.html"
    out.write_text(panels.saved_page(show_answer(config, pipeline, photo, question, told.n_keep, image)))
    if told.grids[0] is None:
        lines.append("  the tokens of this image lie on no single grid: the page shows no patches")
    lines.append(f"  {out}")
    return "\n".join(lines)


def show_answer(
    config: dict[str, Any], pipeline: Pipeline, photo: Image.Image, question: str, n_keep: int, path: str
) -> dict[str, Any]:
    """What the page draws: all tokens, and the pruner of ``pipeline`` at its budget."""
    adapter, method, keep = pipeline.adapter, pipeline.pruner, pipeline.keep
    changed = {
        one.name: getattr(method, one.name)
        for one in fields(method)
        if getattr(method, one.name) != one.default and one.name in config["pruner"]
    }
    whole = views.Cell("none", PRUNERS["none"](), 1.0)
    cell = views.Cell(config["pruner"]["name"], method, n_keep if isinstance(keep, Auto) else keep, changed)
    model, decoding = (config["model"]["name"], config["model"]["path"]), pipeline.decoding
    seen = views.see(adapter, photo)
    encoded = views.read(adapter, seen, question)
    cells = [whole] if cell.pruner == "none" else [whole, cell]
    runs = [views.show_cell(adapter, model, seen, encoded, question, one, decoding, path) for one in cells]
    return views.show(adapter, model[0], seen, [views.show_question(question, encoded, runs)])
