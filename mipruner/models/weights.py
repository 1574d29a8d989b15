"""Loads the weights of a model from a folder, and refuses a checkpoint that does not have all of them."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mipruner.errors import ModelError


def load_weights(model_class: Any, folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load ``model_class.from_pretrained`` from safetensors.

    transformers fills missing weights with random numbers. This function raises an error instead.

    Raises
    ------
    ModelError
        If a parameter of the model has no weight in the checkpoint, or a weight has no parameter.
    """
    model, report = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    wrong = [f"{kind} {_few(report[f'{kind}_keys'])}" for kind in ("missing", "unexpected") if report[f"{kind}_keys"]]
    if wrong:
        raise ModelError(
            f"the weights in {folder} are not those of a {type(model).__name__}: {'; '.join(wrong)}. They were saved "
            "for another class, or by a version of transformers with other names: save or download them again"
        )
    return model


def _few(names: Collection[str]) -> str:
    """The first names, and the number of all."""
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first}, ... ({len(names)} in all)"
