"""Replaces prompts by short prompts before the first layer, and computes positions and mask of the following text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mipruner.caches import CacheState, length
from mipruner.errors import InputError
from mipruner.prompt import Batch, Encoded, Short, collate, cut
from mipruner.selection import Selection


@dataclass
class Prompts:
    """The prompts with images of one call, and their kept tokens.

    Attributes
    ----------
    is_visual : Tensor [B, S] bool
        Visual tokens of the full prompts.
    budgets : sequence of int
        Nominal number of visual tokens that a `DecoderPruner` keeps of each prompt.
    attention : sequence of Tensor [n_visual] or None, optional
        Attention in the vision encoder for each prompt, for methods that need it.
    encoded, selections
        Each prompt, and the `Selection` for each of its images. Empty if no token is dropped before the first layer.
    is_open : bool
        Whether the question that selected the tokens had no end yet.
    """

    is_visual: Tensor
    budgets: Sequence[int] = ()
    attention: Sequence[Tensor | None] | None = None
    encoded: Sequence[Encoded] = ()
    selections: Sequence[Sequence[Selection]] = ()
    is_open: bool = False


@dataclass
class ShortInputs:
    """Short prompts at the input of the first layer.

    Attributes
    ----------
    changes : dict
        Arguments of the language model that replace the caller's.
    valid : Tensor [B, n_past + n] bool
        Columns of the cache after the prompt that are not padding.
    columns : Tensor [B, n]
        Index of each row in the caller's prompt; -1 is padding.
    is_visual : Tensor [B, n] bool
    removed : int
        Number of columns of the caller's prompt that were removed.
    last : Tensor [P, B]
        Position of the last token.
    """

    changes: dict[str, Any]
    valid: Tensor
    columns: Tensor
    is_visual: Tensor
    removed: int
    last: Tensor


def build_inputs(prompts: Prompts, kwargs: dict[str, Any], state: CacheState | None, repack: bool) -> ShortInputs:
    """Build the language model's arguments for the short prompts, after the columns that the cache already holds."""
    shape, n_past = prompts.is_visual.shape, length(kwargs.get("past_key_values"))
    mask = padding(kwargs.get("attention_mask"), n_past + (state.removed if state else 0) + shape[1])
    shorts = [cut(*pair, repack=repack) for pair in zip(prompts.encoded, prompts.selections, strict=True)]
    if state is None and not _differ(shorts, prompts):
        return _whole(prompts, kwargs, mask, n_past)
    real = torch.ones_like(prompts.is_visual) if mask is None else mask[:, -shape[1] :]
    batch = collate(shorts)
    position_ids = _positions(batch, prompts.encoded, state, mask, n_past, repack)
    new = torch.ones_like(batch.is_visual) if batch.attention_mask is None else batch.attention_mask.bool()
    past = _past(state, mask, n_past, shape[1], new)
    valid = new if past is None else torch.cat([past, new], 1)
    # Without a cache, only a mask distinguishes gaps between positions from several prompts in one row.
    plain = kwargs.get("past_key_values") is not None and bool(valid.all()) and not _is_given(kwargs)
    return ShortInputs(
        changes=batch.language_model_inputs()
        | {"position_ids": position_ids, "attention_mask": None if plain else valid.long()},
        valid=valid,
        columns=_columns(real, [short.index for short in shorts], new),
        is_visual=batch.is_visual,
        removed=(state.removed if state else 0) + shape[1] - new.shape[1],
        last=_last(position_ids, new),
    )


def follow(kwargs: dict[str, Any], state: CacheState) -> tuple[dict[str, Any], Tensor | None]:
    """Positions and mask of text that follows a short prompt, and which of its columns are not padding."""
    embeds = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    n_past, n_new = length(kwargs["past_key_values"]), embeds.shape[1]
    if state.is_open and n_new > 1 and n_past == state.valid.shape[1]:
        raise InputError("this prompt was pruned before its question had ended: give the prompt in one piece")
    rest = _rest(state, kwargs.get("attention_mask"), n_past, n_new)
    position_ids = _ahead(state, rest, n_past, n_new)
    mask = None
    if rest is not None or state.padded:
        behind = state.valid.new_ones(len(state.valid), n_past - state.valid.shape[1] + n_new)
        mask = torch.cat([state.valid, behind if rest is None else rest], 1).long()
    return {"attention_mask": mask, "position_ids": position_ids[0] if len(position_ids) == 1 else position_ids}, rest


def left(visual: Tensor, columns: Tensor, is_visual: Tensor) -> Iterator[Tensor]:
    """Indices [n_kept] of the kept visual tokens among all visual tokens of each prompt, without merged rows.

    is_visual [B, S] describes the full prompts; visual [B, n] and columns [B, n] describe the remaining rows.
    """
    for at, own, places in zip(is_visual, visual, columns, strict=True):
        yield (at.cumsum(0) - 1)[places[own & (places >= 0)]]


def padding(mask: Tensor | dict[str, Tensor] | None, n_columns: int) -> Tensor | None:
    """Which columns [B, n_columns] of the caller's mask are not padding; None if all are.

    Raises
    ------
    InputError
        If the mask has another length, or has the shape [.., query, key] but is not the mask of a static cache.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return None
    if mask.ndim == 4:  # made by generate for a static cache: columns that the last token sees
        mask = mask[:, 0, -1, :n_columns]
        mask = mask if mask.dtype == torch.bool else mask == 0
    elif mask.shape[1] != n_columns:
        raise InputError(f"the attention mask has {mask.shape[1]} columns where the prompt has {n_columns}")
    return mask.bool()


def _differ(shorts: Sequence[Short], prompts: Prompts) -> bool:
    chosen = [selection for of_images in prompts.selections for selection in of_images]
    merged = any(selection.embeds is not None or selection.merge is not None for selection in chosen)
    return merged or any(len(s.embeds) < len(e.embeds) for s, e in zip(shorts, prompts.encoded, strict=True))


def _is_given(kwargs: dict[str, Any]) -> bool:
    return getattr(kwargs.get("attention_mask"), "ndim", 0) == 2


def _whole(prompts: Prompts, kwargs: dict[str, Any], mask: Tensor | None, n_past: int) -> ShortInputs:
    """Short prompts with all tokens."""
    batch, n = prompts.is_visual.shape
    valid = prompts.is_visual.new_ones(batch, n_past + n) if mask is None else mask.expand(batch, -1)
    new, place = valid[:, n_past:], torch.arange(n, device=valid.device).expand(batch, n)
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        position_ids = place + n_past
    return ShortInputs({}, valid, torch.where(new, place, -1), prompts.is_visual & new, 0, _last(position_ids, new))


def _positions(
    batch: Batch, encoded: Sequence[Encoded], state: CacheState | None, mask: Tensor | None, n_past: int, repack: bool
) -> Tensor:
    """Positions [B, n] or [P, B, n] of short prompts: the original ones, or renumbered after those in the cache."""
    if not repack:
        return batch.position_ids
    if state is None:
        starts = torch.stack([sample.position_ids[0, 0] for sample in encoded])
    else:
        n_since = n_past - state.valid.shape[1]
        rest = None if mask is None else mask[:, state.valid.shape[1] + state.removed :]
        starts = state.last[0] + 1 + (n_since if rest is None else rest[:, :n_since].sum(1))
    return batch.position_ids + starts[:, None]


def _past(state: CacheState | None, mask: Tensor | None, n_past: int, n_new: int, like: Tensor) -> Tensor | None:
    """Which columns [B, n_past] of the cache are valid."""
    if not n_past:
        return None
    if state is None:
        return like.new_ones(len(like), n_past) if mask is None else mask[:, :n_past]
    n_since = n_past - state.valid.shape[1]
    since = like.new_ones(len(like), n_since) if mask is None else mask[:, -n_new - n_since : -n_new]
    return torch.cat([state.valid, since], 1)


def _rest(state: CacheState, mask: Tensor | dict[str, Tensor] | None, n_past: int, n_new: int) -> Tensor | None:
    """Which columns [B, k] after the prompts are valid, from the caller's mask."""
    if getattr(mask, "ndim", 0) != 2:  # none, or one for a static cache, which is computed again
        return None
    rest = padding(mask, n_past + state.removed + n_new)
    assert rest is not None
    return rest[:, state.valid.shape[1] + state.removed :]


def _ahead(state: CacheState, rest: Tensor | None, n_past: int, n_new: int) -> Tensor:
    """Positions [P, B, n_new] of the text that follows."""
    if rest is None:
        n_since = n_past - state.valid.shape[1]
        return state.last[..., None] + 1 + n_since + torch.arange(n_new, device=state.last.device)
    return state.last[..., None] + rest.cumsum(1)[:, -n_new:].to(state.last)


def _columns(real: Tensor, indices: Sequence[Tensor | None], new: Tensor) -> Tensor:
    """Column of each row [B, n] in the caller's prompts, given its index among the tokens that are not padding."""
    columns = torch.full(new.shape, -1, device=new.device)
    for row, places, index in zip(columns, real, indices, strict=True):
        assert index is not None
        row[len(row) - len(index) :] = places.nonzero()[:, 0][index]
    return columns


def _last(position_ids: Tensor, valid: Tensor) -> Tensor:
    """Highest position [P, B] of each prompt. Later text starts after the highest of time, height and width."""
    position_ids = position_ids[None] if position_ids.ndim == 2 else position_ids
    last = position_ids.expand(-1, *valid.shape).masked_fill(~valid, -1).amax(-1)
    n_text = len(last) % 3
    if len(last) > 2:
        last = torch.cat([last[:n_text], last[n_text:].amax(0, keepdim=True).expand_as(last[n_text:])])
    return last
