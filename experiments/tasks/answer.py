"""Answer one question about one image of your own, and draw the tokens that were kept.

python run.py image=photo.jpg question="What is on the table?" model=llava15_7b keep=64
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from experiments import build
from mipruner.errors import InputError
from mipruner.models import Prompt
from mipruner.pipeline import Pipeline

Draw = Callable[..., None]
"""Takes image, question, title, box, grid, kept indices and the file to write."""


def open_picture(path: str) -> Image.Image:
    """The picture in RGB, upright as the camera held it. Raises `InputError`."""
    if not Path(path).is_file():
        raise InputError(f"no picture {path}: give the path of a JPEG or PNG file")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from error


def run(config: dict[str, Any], overrides: Sequence[str] = (), draw: Draw | None = None) -> None:
    image, question = config["image"], config["question"]
    config = build.resolve(config)
    if not any(override.startswith("decoding.max_new_tokens=") for override in overrides):
        config["decoding"]["max_new_tokens"] = 128  # the dataset's number is for its own answers
    print(answer(config, image, question, draw))


def answer(config: dict[str, Any], image: str | None, question: str | None, draw: Draw | None = None) -> str:
    """The answer, with tokens and times. ``draw`` draws the kept tokens into the results folder.

    Raises
    ------
    InputError
        If the picture cannot be read or the question is empty.
    """
    if image is None:
        raise InputError("a question needs a picture: give image=photo.jpg, too")
    if not str(question or "").strip():
        raise InputError(f'the question about {image} is empty: give question="What is this?", too')
    picture, question = open_picture(image), str(question)
    choices = build.pruner(config), build.budget(config), build.decoding(config)
    for _ in range(2):  # the first warms up
        pipeline = Pipeline(build.model(config), *choices)
        (told,) = pipeline([Prompt(question, [picture])])
    kept, ms = told.selections[0].indices.tolist(), pipeline.watch.ms
    lines = [
        told.text,
        f"  {config['model']['name']}  {config['pruner']['name']}  tokens kept {len(kept)} of {told.n_visual[0]}",
        "  ms, once warm: "
        + "  ".join(f"{stage} {spent:.1f}" for stage, spent in (ms | {"total": sum(ms.values())}).items()),
    ]
    if told.grids[0] is None:
        lines.append("  the tokens of this picture lie on no single grid: nothing was drawn")
    elif draw is not None:
        out = Path(config["results"]) / "answers"
        out.mkdir(parents=True, exist_ok=True)
        out /= f"{Path(image).stem},{config['model']['name']},{config['pruner']['name']},keep={config['keep']}.png"
        title = f"{config['pruner']['name']}, {len(kept)} of {told.n_visual[0]}\n{told.text}"
        draw(picture, question, title, told.boxes[0], told.grids[0], kept, out)
        lines.append(f"  {out}")
    return "\n".join(lines)
