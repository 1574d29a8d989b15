"""Shortens further arguments of a language model that have the length of the prompt, such as token types and masks."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_masks_for_generate

from mipruner.errors import InputError

SERVED = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "input_ids"}
SERVED |= {"logits_to_keep", "labels"}


@dataclass(frozen=True)
class Cut:
    """Which columns of a prompt are kept.

    Attributes
    ----------
    columns : Tensor [B, n]
        Index in the full prompt of each remaining column; -1 is padding.
    is_visual : Tensor [B, S] bool
        Visual tokens of the full prompt.
    model_type : str
        Named in error messages.
    """

    columns: Tensor
    is_visual: Tensor
    model_type: str = "this model"

    def __call__(self, name: str, x: Any) -> Any:
        """Return the argument ``x`` of the full prompt, cut to the short prompt.

        Tensors [B, S, ..] lose columns and tensors [n_visual, ..] lose rows, also inside dicts, lists and tuples.

        Raises
        ------
        InputError
            If another dimension of a tensor is as long as the prompt or as its visual tokens.
        """
        if isinstance(x, dict):
            return type(x)((k, self(name, v)) for k, v in x.items())
        if isinstance(x, list | tuple):
            return type(x)(self(name, v) for v in x)
        if not isinstance(x, Tensor) or x.ndim == 0:
            return x
        n_visual = int(self.is_visual.sum())
        if x.ndim > 1 and x.shape[:2] == self.is_visual.shape:
            index = self.columns.clamp_min(0)
            tail = [1] * (x.ndim - 2)
            short = x.gather(1, index.reshape(*index.shape, *tail).expand(*index.shape, *x.shape[2:]))
            return short.masked_fill(self.columns.reshape(*index.shape, *tail) < 0, 0)
        if len(x) == n_visual:
            return x[self.is_kept[self.is_visual]]
        if {self.is_visual.shape[1], n_visual} & set(x.shape):
            raise InputError(
                f"{self.model_type}: the language model's argument {name} {list(x.shape)} is as long as the prompt "
                f"({n_visual} of {self.is_visual.shape[1]} tokens are visual) in a way that is not known; "
                "see docs/models.md"
            )
        return x

    @property
    def is_kept(self) -> Tensor:
        kept = torch.zeros_like(self.is_visual)
        for row, columns in zip(kept, self.columns, strict=True):
            row[columns[columns >= 0]] = True
        return kept


@dataclass(frozen=True)
class Masks:
    """Masks that a model builds from a prompt before it calls its language model (Gemma 3, PaliGemma).

    Attributes
    ----------
    model : PreTrainedModel
    outer : callable
        Returns the keyword arguments of the current call of the module around the language model, or None.
    """

    model: PreTrainedModel
    outer: Callable[[], dict[str, Any] | None]

    def given(self, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """``kwargs`` of the language model, with the mask of the caller if the model replaced it."""
        mask, outer = kwargs.get("attention_mask"), self.outer()
        if outer is None or (not isinstance(mask, dict) and getattr(mask, "ndim", 2) == 2):
            return None
        own = outer.get("attention_mask")
        if isinstance(own, dict) or getattr(own, "ndim", 2) != 2:  # made by generate for a static cache
            return None
        return kwargs | {"attention_mask": own}

    def types(self) -> dict[str, Tensor]:
        """Token types of the prompt [B, S]."""
        outer = self.outer() or {}
        return {name: x for name, x in outer.items() if name.endswith("token_type_ids") and x is not None}

    def make(
        self, made: Any, own: dict[str, Any], short: dict[str, Any], short_types: dict[str, Tensor], is_first: bool
    ) -> Any:
        """Build the masks for the arguments ``short`` of the language model.

        The way is the first one of `WAYS` that gives exactly the masks ``made`` for the full prompt ``own``. Text that
        follows has no images, so its masks are those of the first way that makes the same kinds of masks.

        Raises
        ------
        InputError
            If none does.
        """
        kinds = _kinds(made)
        for way in WAYS:
            if is_first and not _same(way(self.model, kinds, _arguments(own), self.types(), True), made):
                continue
            masks = way(self.model, kinds, _arguments(short), short_types, is_first)
            if is_first or _kinds(masks) == kinds:
                return masks
        raise InputError(
            f"{self.model.config.model_type}: the model makes its attention masks in a way that is not known, so "
            "they cannot be shortened; see docs/models.md"
        )


def _by_kind(
    model: PreTrainedModel, kinds: Set[str], call: dict[str, Any], types: dict[str, Tensor], is_first: bool
) -> Any:
    """A mask for each kind of layer, all tokens alike (Inkling)."""
    config = model.config.get_text_config()
    functions: dict[str, Any] = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    if not kinds or not all(callable(functions.get(kind)) for kind in kinds):
        return None
    return {kind: functions[kind](config=config, **call) for kind in kinds}


def _by_model(
    model: PreTrainedModel, kinds: Set[str], call: dict[str, Any], types: dict[str, Tensor], is_first: bool
) -> Any:
    """As the model's own method for a static cache does (Gemma 3, PaliGemma)."""
    make: Callable[..., Any] = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    return make(config=model.config, is_first_iteration=is_first, **call, **types)


def _by_blocks(
    model: PreTrainedModel, kinds: Set[str], call: dict[str, Any], types: dict[str, Tensor], is_first: bool
) -> Any:
    """Tokens of an image see each other in all layers (Gemma 4 without vision encoder)."""
    blocks = None
    if (images := types.get("mm_token_type_ids")) is not None:
        inside = images != 0
        starts = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
        blocks = torch.where(inside, starts.cumsum(1) - 1, -1)
    return create_masks_for_generate(config=model.config.get_text_config(), block_sequence_ids=blocks, **call)


WAYS = (_by_kind, _by_model, _by_blocks)


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    names = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")
    return {name: call.get(name) for name in names}


def _kinds(masks: Any) -> Set[str]:
    return masks.keys() if isinstance(masks, dict) else frozenset()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
