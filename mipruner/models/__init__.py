"""Adapters, one file per model family. `FAMILIES` contains every class of this folder with ``model_types``."""

from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from string import Formatter
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig

from mipruner.errors import InputError, ModelError
from mipruner.models.adapter import Adapter
from mipruner.models.generic import PAGE, GenericAdapter, refusal
from mipruner.models.hub import chat_template, locate
from mipruner.models.processor import load_processor
from mipruner.models.weights import load_weights
from mipruner.prompt import Prompt, Video


def _adapters() -> Iterator[type[Adapter]]:
    """Every adapter class of this folder."""
    for name in [f"{__name__}.{module.name}" for module in iter_modules(__path__)]:
        for value in vars(import_module(name)).values():
            if isinstance(value, type) and issubclass(value, Adapter) and value.__module__ == name:
                yield value


FAMILIES: dict[str, type[Adapter]] = {
    name: adapter for adapter in _adapters() for name in vars(adapter).get("model_types", ())
}
"""Adapter class by ``model_type`` of the model's config."""

PROMPTS: dict[str, str] = {
    name: template for adapter in FAMILIES.values() for name, template in adapter.prompts.items()
}
"""Prompt templates by their name in the original code."""


def load(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    device_map: str | dict[str, Any] | None = None,
    quantization: str | None = None,
    attn_implementation: str = "sdpa",
    prompt: str | None = None,
    **options: Any,
) -> Adapter:
    """Load a stock transformers model from a folder or the hub and wrap it in the adapter of its family.

    A model type without a family gets a `GenericAdapter` with the model's own processor, for `mipruner.processed`.

    Parameters
    ----------
    path : str or Path
        A folder with config.json and safetensors, or a hub id.
    revision : str, optional
        Commit, tag or branch on the hub.
    dtype : "bfloat16", "float16", "float32" or "auto"
        ``auto``: the dtype of the checkpoint.
    device : str
        Device of the model; ignored if ``device_map`` is given.
    device_map : str or dict, optional
        Spread the model over several GPUs; ``auto`` uses all.
    quantization : "4bit" or "8bit", optional
        Load the weights quantized by bitsandbytes (NF4, or LLM.int8).
    prompt : str, optional
        A name of `PROMPTS` or a template, see `Adapter`.
    options
        Options of the family's adapter.

    Raises
    ------
    ModelError
        If the model does not exist, its weights do not fit, it cannot be pruned, or its processor needs a missing
        package.
    InputError
        If an option is unknown, or ``prompt`` is not a template.
    """
    template = check_template(prompt)
    folder = locate(str(path), revision)
    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise InputError(f"unknown dtype {dtype!r}: choose auto, bfloat16, float16 or float32")
    if quantization not in (None, "4bit", "8bit"):
        raise InputError(f"unknown quantization {quantization!r}: choose 4bit or 8bit")
    weights = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "attn_implementation": attn_implementation,
    }
    if quantization == "4bit":
        compute = torch.bfloat16 if dtype == "auto" else weights["dtype"]
        weights["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    elif quantization == "8bit":
        weights["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if device_map is not None or quantization is not None:
        weights["device_map"] = device if device_map is None else device_map
    try:
        config = AutoConfig.from_pretrained(folder)
        family = FAMILIES.get(config.model_type, GenericAdapter)
        if family is GenericAdapter:
            with torch.device("meta"):
                reason = refusal(AutoModelForImageTextToText.from_config(config))
            if reason is not None:
                raise ModelError(f"{path} is a {config.model_type!r}, which cannot be pruned: {reason}; {PAGE}")
            processor: Any = load_processor(folder, config.model_type)
            tokenizer = processor.tokenizer
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            processor = family.image_processor_class.from_pretrained(folder)
        tokenizer.chat_template = chat_template(folder) or tokenizer.chat_template
        model = load_weights(AutoModelForImageTextToText, folder, **weights).eval()
        if "device_map" not in weights:
            model = model.to(device)
    except (OSError, ImportError, RuntimeError, ValueError, AssertionError, SafetensorError) as error:
        raise ModelError(f"cannot load {path} from {folder}: {str(error).strip().splitlines()[0]}") from error
    try:
        return family(model, tokenizer, processor, prompt=template, **options)
    except TypeError as error:
        raise InputError(f"{path} is a {config.model_type}: {str(error).split('() ')[-1]}") from error


def check_template(prompt: str | None) -> str | None:
    """Return the template that ``prompt`` names or is.

    Raises
    ------
    InputError
        If it is not a name of `PROMPTS`, and does not have exactly the fields {image} and {text}, once each.
    """
    if prompt is None:
        return None
    if prompt in PROMPTS:
        return PROMPTS[prompt]
    try:
        names = sorted(name for _, name, _, _ in Formatter().parse(prompt) if name is not None)
    except ValueError:
        names = []
    if names != ["image", "text"]:
        near = get_close_matches(prompt, PROMPTS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"unknown prompt {prompt[:60]!r}: {hint}give one of {', '.join(PROMPTS)}, or a template with {{image}} and "
            "{text}"
        )
    return prompt


__all__ = ["FAMILIES", "PROMPTS", "Adapter", "ModelError", "Prompt", "Video", "load"]
