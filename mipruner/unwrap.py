"""Finds the transformers model inside wrappers: torch.compile, PEFT, DistributedDataParallel."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mipruner.errors import InputError
from mipruner.models import FAMILIES
from mipruner.models.generic import PAGE, refusal


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside a wrapper.

    Raises
    ------
    InputError
        If there is none with ``generate``, or it cannot be pruned.
    """
    if isinstance(model, nn.DataParallel):
        raise InputError("nn.DataParallel copies the model for each call: use DistributedDataParallel, or one process")
    for _ in range(8):
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel) and hasattr(model, "module"):
            model = model.module
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise InputError(
            f"{type(model).__name__} cannot be pruned: give the transformers model that has generate (of an adapter or "
            "a pipeline, its .model)"
        )
    if model.config.model_type not in FAMILIES and (reason := refusal(model)):
        raise InputError(
            f"{model.config.model_type!r} has no adapter, and cannot be pruned without one: {reason}; {PAGE}"
        )
    return model
