"""Answers one question about one image of your own, and writes a page that shows the kept tokens.

python run.py image=photo.jpg question="What is on the table?" model=llava15_7b keep=64
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from experiments import build
from experiments.explorer import panels, views
from experiments.images import open_image
from experiments.results import cell_id, write_atomic
from mipruner.errors import InputError
from mipruner.models import Prompt
from mipruner.pipeline import Pipeline
from mipruner.processed import ProcessorPipeline, pipeline_of
from mipruner.pruners import PRUNERS
from mipruner.selection import Auto


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    image, question = config["image"], config["question"]
    config = build.resolve(config)
    if "engine" in config:
        raise InputError("one image of your own needs engine=pipeline: a server does not tell which tokens it kept")
    if not any(override.startswith("decoding.max_new_tokens=") for override in overrides):
        config["decoding"]["max_new_tokens"] = 128  # the limit of the dataset is for its own answers
    for line in answer(config, image, question):
        print(line, flush=True)


def answer(config: dict[str, Any], image: str | None, question: str | None) -> Iterator[str]:
    """Lines of output: the answer, then tokens and times, then the path of the page with the kept tokens.

    Each line is yielded at once, so that a later error does not lose the answer.

    Raises
    ------
    InputError
        If the image cannot be read or the question is empty.
    """
    if image is None:
        raise InputError("a question needs an image: give image=photo.jpg, too")
    if not str(question or "").strip():
        raise InputError(f'the question about {image} is empty: give question="What is this?", too')
    if not Path(image).is_file():
        raise InputError(f"no image {image}: give the path of a JPEG or PNG file")
    try:
        shown = open_image(Path(image))
    except ValueError as error:
        raise InputError(str(error)) from error
    prompt = Prompt(str(question), [shown])
    choices = build.pruner(config), build.budget(config), build.decoding(config)
    (told,) = pipeline_of(build.any_model(config), *choices)([prompt])  # also a warm-up
    yield told.text.strip() or panels.NOTHING
    if note := shown.info.get("note"):
        yield f"  {note}"
    pipeline = pipeline_of(build.any_model(config), *choices)
    (told,) = pipeline([prompt])
    kept, ms = sum(selection.n_rows for selection in told.selections), pipeline.watch.ms
    yield f"  {config['model']['name']}  {config['pruner']['name']}  tokens kept {kept} of {sum(told.n_visual)}"
    spent = "  ".join(f"{stage} {value:.1f}" for stage, value in (ms | {"total": sum(ms.values())}).items())
    yield f"  ms, once warm: {spent}"
    if not pipeline.adapter.reads_inside:
        yield f"  no page shows the tokens: a {pipeline.adapter.model.config.model_type} has no adapter here"
        return
    try:
        page = panels.saved_page(show_answer(config, pipeline, shown, prompt.text, told.n_keep, image))
        out = page_path(config, Path(image), prompt.text)
        write_atomic(out, page)
    except Exception as error:
        print(f"warning: the page was not written: {error!r}", file=sys.stderr)
        return
    if told.grids[0] is None:
        yield "  the tokens of this image lie on no single grid: the page shows no patches"
    yield f"  {out}"


def page_path(config: dict[str, Any], image: Path, question: str) -> Path:
    """Unique path for each question, image and config. The stem is cut, because names have at most 255 bytes."""
    parts = json.dumps([cell_id(config), question]).encode() + image.read_bytes()
    stem = re.sub(r"[^\w.-]+", "_", image.stem)[:40]
    name = f"{stem},{config['model']['name']},{config['pruner']['name']},keep={config['keep']}"
    return Path(config["results"]) / "answers" / f"{name}-{hashlib.sha256(parts).hexdigest()[:8]}.html"


def show_answer(
    config: dict[str, Any],
    pipeline: Pipeline | ProcessorPipeline,
    image: Image.Image,
    question: str,
    n_keep: int,
    path: str,
) -> dict[str, Any]:
    """Data of the page: all tokens, and the pruner of ``pipeline`` at its budget."""
    adapter, method, keep = pipeline.adapter, pipeline.pruner, pipeline.keep
    changed = {
        one.name: getattr(method, one.name)
        for one in fields(method)
        if getattr(method, one.name) != one.default and one.name in config["pruner"]
    }
    whole = views.Cell("none", PRUNERS["none"](), 1.0)
    cell = views.Cell(config["pruner"]["name"], method, n_keep if isinstance(keep, Auto) else keep, changed)
    model, decoding = (config["model"]["name"], config["model"]["path"]), pipeline.decoding
    seen = views.see(adapter, image)
    encoded = views.read(adapter, seen, question)
    cells = [whole] if cell.pruner == "none" else [whole, cell]
    runs = [views.show_cell(adapter, model, seen, encoded, question, one, decoding, path) for one in cells]
    return views.show(adapter, model[0], seen, [views.show_question(question, encoded, runs)])
