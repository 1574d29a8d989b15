"""Adapters: what differs between model families, and nothing else."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from mipruner.errors import ModelError
from mipruner.models.base import Adapter, Prompt
from mipruner.models.llava import LlavaAdapter

FAMILIES: dict[str, type[Adapter]] = {"llava": LlavaAdapter}
"""Adapter by the ``model_type`` of the model's config."""


def load(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    positions: str = "repack",
    prompt: str | None = None,
) -> Adapter:
    """Load a stock transformers model from a folder or the hub and wrap it in the adapter of its family.

    Raises
    ------
    ModelError
        If the folder or the hub has no such model, or its family has no adapter.
    """
    path = str(path)
    if path.startswith(("/", ".")) and not Path(path).is_dir():
        raise ModelError(f"no folder {path}: give a folder with config.json and model.safetensors, or a hub id")
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        if config.model_type not in FAMILIES:
            raise ModelError(f"{path} is a {config.model_type!r}; there are adapters for {', '.join(sorted(FAMILIES))}")
        family = FAMILIES[config.model_type]
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        image_processor = family.image_processor_class.from_pretrained(path, revision=revision)
        model = AutoModelForImageTextToText.from_pretrained(
            path,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
        )
    except OSError as error:
        raise ModelError(f"cannot load {path}: {str(error).splitlines()[0]}") from error
    return family(model.to(device).eval(), tokenizer, image_processor, positions=positions, prompt=prompt)


__all__ = ["FAMILIES", "Adapter", "ModelError", "Prompt", "load"]
