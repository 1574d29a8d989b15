"""Loads the processor of a model type without an adapter."""

from pathlib import Path

from transformers import AutoProcessor, ProcessorMixin

from mipruner.errors import ModelError
from mipruner.models.generic import PAGE

PACKAGES = ("torchvision", "timm", "num2words", "mistral_common", "sentencepiece", "librosa", "scipy", "av")
"""Packages that processors of transformers may need."""


def load_processor(folder: Path, model_type: str) -> ProcessorMixin:
    """The model's own processor, with left padding.

    Raises
    ------
    ModelError
        If it is missing, or needs a missing package.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        raise ModelError(
            f"the processor of {model_type} needs a package that does not import here, {lacked(error)}: install it, or "
            f"make its inputs yourself and use mipruner.prune; {PAGE}"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(
            f"{folder} holds no processor of {model_type} that loads: {first_line(error)}; {PAGE}"
        ) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ModelError(
            f"{folder} has no image processor beside its tokenizer (processor_config.json), "
            f"which {model_type} needs; {PAGE}"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def lacked(error: ImportError) -> str:
    """Missing packages that an error message of transformers names."""
    return ", ".join(name for name in PACKAGES if name in str(error).lower()) or first_line(error)


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
