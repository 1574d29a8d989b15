"""Draws the PMI of each word of the question over the image, with the model of a finished cell.

    python run.py task=heat cell=results/demo_llava/demo/mi/keep=16-1234abcd
    python run.py task=heat cell=... ids=[3/7] words=[cup,blue] out=heat.pdf

Records do not contain features, so the model is loaded again.
"""

from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments import build
from experiments.benchmarks.base import Benchmark, SampleError
from mipruner.errors import InputError
from mipruner.models import Prompt
from mipruner.pmi import cross_pmi


def word_pmi(config: dict[str, Any], benchmark: Benchmark, sample: str) -> tuple[list[str], np.ndarray]:
    """The words of T, and PMI(v_i; t_j) [n_visual, n_text] (eq. 18) of the first image, for the model of a cell.

    tau and normalization are those of the cell's pruner, or else those of the paper.
    """
    (question,) = (one for one in benchmark.samples() if one.id == sample)
    prompt = Prompt(
        text=question.text,
        images=benchmark.images(question.image_id),
        query=question.question if config["text_scope"] == "question" else None,
    )
    adapter = build.model(config | {"device": "cpu"})
    with torch.inference_mode():
        visuals = adapter.encode([adapter.preprocess(image) for image in prompt.images])
        features = adapter.read(prompt, visuals, {"words"}).features()[0]
        options = {key: config["pruner"][key] for key in ("tau", "normalization") if key in config["pruner"]}
        return list(features.words or ()), cross_pmi(features.visual, features.text, **options).numpy()


def run(config: dict[str, Any], overrides: Sequence[str], draw: Callable[..., None]) -> None:
    """Draw into a file. ``draw`` is `analysis.masks.draw_heat`. Raises `InputError` for an unknown cell, sample or
    word.
    """
    if config["cell"] is None:
        raise InputError("task=heat needs cell=..., the folder of a finished cell")
    cell = (sorted(glob(config["cell"])) or [config["cell"]])[0]
    out = Path(config["out"] or "heat.png")
    try:
        draw(Path(cell), word_pmi, out, config["samples"], config["ids"], config["words"])
    except (ValueError, SampleError) as error:
        raise InputError(str(error)) from error
    print(out)
