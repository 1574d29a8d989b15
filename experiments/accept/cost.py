"""Prints the download size and the lower bound of the time before an acceptance starts."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from experiments.accept.exactness import NEW_TOKENS
from experiments.accept.scores import LIMIT, PAPER_BUDGETS, PAPER_METHODS, WHOLE, datasets
from experiments.flops import Decoder, architecture
from experiments.machine import CLOCKS, measure_limits
from experiments.tasks.estimate import estimate
from experiments.tasks.hours import QUESTIONS
from mipruner.errors import InputError
from mipruner.models.hub import lacking

TYPICAL_VISUAL = 576
"""Number of visual tokens in the estimate for models whose images have no fixed number."""


def cost_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """`estimate` of the model; None if its shape is unknown without its files."""
    model = config["model"]
    for n_visual in (None, TYPICAL_VISUAL):
        try:
            return estimate(model["name"], 1.0, n_visual)
        except (InputError, ValueError):
            continue
    return None


def announce(
    config: dict[str, Any], level: str, n_images: int, device: torch.device, cost: dict[str, Any] | None
) -> str:
    """One line with the download size and the lower bound of the time of this level."""
    model = config["model"]
    download = "nothing to download"
    if not is_here(str(model["path"]), model["revision"]):
        download = "the weights to download" + ("" if cost is None else f", about {cost['weights_gib']:.0f} GiB")
    if cost is None:
        return f"{download}; the time is not known, since no shape of {model['name']} is"
    dtype = getattr(torch, model["dtype"]) if model["dtype"] != "auto" else torch.bfloat16
    limits = measure_limits(device, dtype, CLOCKS["wall"])
    weights_ms = cost["weights_gib"] * 2**30 / limits["copy_gb_per_s"] / 1e6
    decoder = Decoder.of(architecture(model["name"]).get_text_config())
    flops = decoder.prefill_flops(cost["n_visual"] + cost["n_text"]) + (cost["vision_tflop"] or 0) * 1e12
    answer_ms = flops / limits["product_tflop_per_s"] / 1e9 + NEW_TOKENS * weights_ms
    questions = 8 * n_images
    if level in ("scores", "paper"):
        whole = sum(QUESTIONS[name] if name in WHOLE else LIMIT for name in datasets(model["name"]))
        questions += whole * (1 + len(PAPER_METHODS) * len(PAPER_BUDGETS) * (level == "paper"))
    minutes = questions * answer_ms / 60000
    return (
        f"{download}; {questions:,} answers, at least {max(minutes, 0.1):.1f} minutes on this device by its measured "
        "speed limits"
    )


def is_here(path: str, revision: str | None) -> bool:
    """Whether the model is a folder or complete in the hub's cache."""
    try:
        folder = path if Path(path).is_dir() else snapshot_download(path, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return False
    return lacking(Path(folder)) is None
