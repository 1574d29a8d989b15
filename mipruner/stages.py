"""Drops the rows of a prompt between two decoder layers, as a `DecoderPruner` selects them.

Rows are removed, not masked, so later layers compute and cache less. Attention is recomputed only for the rows that a
method requests, from the outputs of the query and key projections. So any attention implementation works, and no
attention weights are stored.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mipruner.caches import CacheState, is_dynamic, length
from mipruner.errors import InputError
from mipruner.intercept import Call, captured
from mipruner.layer_form import Form, Rotate, Seen, attention, halves, projections
from mipruner.pruners.base import DecoderPruner, DecoderView, Reduction
from mipruner.short_prompt import Prompts, ShortInputs, left

IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


@dataclass
class Segment:
    """The sequence between two stages during the prefill: n rows per prompt, left-padded.

    columns is the index of each row in the caller's prompt; -1 for padding and merged rows.
    """

    valid: Tensor  # [B, n] bool
    visual: Tensor  # [B, n] bool
    columns: Tensor  # [B, n]
    cos: Tensor  # [B, n, d_rotary]
    sin: Tensor
    position_ids: Tensor | None  # [B, n], or [B, n, P] where layers are given P rows
    n_visual: list[int]

    @property
    def given_positions(self) -> Tensor | None:
        """Positions in the format of a layer, [B, n] or [P, B, n]."""
        if self.position_ids is None or self.position_ids.ndim == 2:
            return self.position_ids
        return self.position_ids.movedim(2, 0)

    def to(self, device: torch.device) -> "Segment":
        """Move to a device, for a model on several devices."""
        if self.valid.device == device:
            return self
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass
class _Plan:
    """Rows of one prompt's old segment that form the new segment."""

    index: Tensor  # [n_new] rows of the old segment; merged rows follow after its end
    place: Tensor  # [n_new] the row whose position each takes
    weights: Tensor  # [n_merged, n_old]

    def __call__(self, rows: Tensor) -> Tensor:
        """Apply the plan to rows [n_old, d]."""
        if len(self.weights):
            rows = torch.cat([rows, (self.weights @ rows.float()).to(rows)])
        return rows[self.index]


class Layers:
    """The decoder layers of one language model, and the method that drops tokens between them.

    ``form`` checks each call if the model has no adapter.
    """

    def __init__(self, model: nn.Module, pruner: DecoderPruner, form: Form | None = None):
        self.form = form
        self.model = cast(Any, model)  # nn.Module does not declare the attributes of a decoder
        self.pruner, self.layers = pruner, list(self.model.layers)
        self.implementation = self.model.config._attn_implementation
        if self.implementation not in IMPLEMENTATIONS:
            raise InputError(f"pruning inside the decoder runs on {', '.join(IMPLEMENTATIONS)}: use sdpa")

    def __len__(self) -> int:
        return len(self.layers)

    def stages(self, pairs: Sequence[tuple[int, int]]) -> set[int]:
        """Layers whose input is shortened, for prompts of (visual tokens, budget)."""
        pruned = [(count, n) for count, n in pairs if n < count]
        wanted = sorted({layer for pair in pruned for layer in self.pruner.stages(*pair, len(self))})
        # Gated linear layers (Qwen3.5) have no attention to read: the stage moves to the next layer that has.
        after_attention = [k for k in range(1, len(self)) if hasattr(self.layers[k - 1], "self_attn")]
        stages = {min(after) for layer in wanted if (after := [k for k in after_attention if k >= layer])}
        if wanted and (wanted[-1] >= len(self) or not stages):
            raise InputError(f"cannot prune at layer {wanted[-1]} of a decoder of {len(self)} layers")
        return stages

    def check(self, prompts: Prompts, kwargs: dict[str, Any]) -> None:
        """Refuse a prompt or a cache that cannot be shortened between layers."""
        cache, shape = kwargs.get("past_key_values"), kwargs["inputs_embeds"].shape[:2]
        if cache is not None and not is_dynamic(cache):
            raise InputError(
                "pruning inside the decoder leaves a cache of its own length to each layer: use a DynamicCache without "
                f"sliding windows, not {type(cache).__name__}"
            )
        if length(cache):
            raise InputError("methods inside the language model start with the prompt: no images after a cached prefix")
        if shape != prompts.is_visual.shape:
            raise InputError(f"is_visual {tuple(prompts.is_visual.shape)} is not of this prompt {tuple(shape)}")

    def begin(
        self, prompts: Prompts, short: ShortInputs, kwargs: dict[str, Any]
    ) -> tuple["Prefill | None", dict[str, Any]]:
        """Start the prefill of prompts that lose rows inside the decoder. Also returns changed arguments. None if no
        prompt does.
        """
        counts = short.is_visual.sum(1).tolist()
        stages = self.stages(list(zip(counts, prompts.budgets, strict=True)))
        if not stages:
            return None, {}
        position_ids = kwargs.get("position_ids")
        renumbers = self.pruner.renumbers and not (position_ids is not None and position_ids.ndim == 3)
        if self.form is not None:
            self.form.check_arguments(kwargs, sum(counts))
        prefill = Prefill(self, prompts, short, kwargs["inputs_embeds"], stages, counts, renumbers)
        return prefill, prefill.take_deepstack(kwargs)

    def mask(self, valid: Tensor, hidden: Tensor, n_past: int) -> Tensor | None:
        """The mask [B, 1, n_query, n_past + n_query] of a layer, in the format of the attention implementation.

        valid [B, n_past + n_query] is True for columns that are not padding.
        """
        n_query, padded = hidden.shape[1], not bool(valid.all())
        valid = valid.to(hidden.device)
        if self.implementation.startswith("flash"):
            return valid if padded else None
        if not padded and (n_query == 1 or (self.implementation == "sdpa" and n_past == 0)):
            return None
        key = torch.arange(n_past + n_query, device=hidden.device)
        query = key[n_past:, None]
        allowed = (key <= query) & valid[:, None, None] | (
            key == query
        )  # a padding row attends to itself, to avoid NaN
        if self.implementation == "sdpa":
            return allowed
        return torch.where(allowed, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)

    def follow(
        self, k: int, hidden: Tensor, kwargs: dict[str, Any], state: CacheState, rest: Tensor | None
    ) -> dict[str, Any]:
        """Arguments of layer k for text after the prompts, if its cache has fewer columns than the first layer's."""
        valid = state.layers[k]
        if valid is state.layers[0]:
            return {}
        if not hasattr(self.layers[k], "self_attn"):
            return {"attention_mask": None}
        n_past, n_query = kwargs["past_key_values"].get_seq_length(k), hidden.shape[1]
        if rest is None and n_query == 1 and state.full[k]:
            changes: dict[str, Any] = {"attention_mask": None}
        else:
            rest = valid.new_ones(len(valid), n_past - valid.shape[1] + n_query) if rest is None else rest
            changes = {"attention_mask": self.mask(torch.cat([valid, rest.to(valid.device)], 1), hidden, n_past)}
        if state.renumbered:
            ahead = n_past - valid.shape[1] + torch.arange(n_query, device=valid.device)
            position_ids = (valid.sum(1, keepdim=True) + ahead).to(hidden.device)
            cos_sin = self.model.rotary_emb(hidden, position_ids)
            changes |= {"position_embeddings": cos_sin, "position_ids": position_ids}
        return changes


@dataclass
class Prefill:
    """The prefill of prompts from the first to the last layer."""

    layers: Layers
    prompts: Prompts
    short: ShortInputs
    embeds: Tensor
    stages: set[int]
    counts: list[int]
    renumbers: bool
    segments: list[Segment] = field(default_factory=list)
    deepstack: list[Tensor] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    calls: dict[int, list[Call]] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)

    def __post_init__(self) -> None:
        self.memory = [{} for _ in self.counts]

    def watch(self, stack: ExitStack) -> None:
        """Capture the queries and keys of the layers before the stages."""
        for stage in self.stages:
            attn = self.layers.layers[stage - 1].self_attn
            whole = () if self.layers.form is None else (attn,)
            modules = [getattr(attn, name) for name in projections(attn)]
            self.calls[stage] = stack.enter_context(captured(*modules, *whole))

    def take_deepstack(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Add deepstack rows here instead of in the model, if a stage comes before the last deepstack layer."""
        deepstack = kwargs.get("deepstack_visual_embeds") or []
        if min(self.stages) >= len(deepstack):
            self.seen.n_added = len(deepstack)
            return {}
        slots = kwargs["visual_pos_masks"][..., None]
        self.deepstack = [
            torch.zeros_like(self.embeds).masked_scatter(slots, rows.to(self.embeds)) for rows in deepstack
        ]
        if self.layers.form is not None:
            self.layers.form.check_deepstack(self.embeds, self.deepstack[0], kwargs)
        return {"visual_pos_masks": None, "deepstack_visual_embeds": None}

    def before_layer(self, k: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Input and arguments of layer k: fewer rows at a stage, and after the first stage their positions and mask."""
        if k == 0:
            self.segments.append(self.first_segment(kwargs))
        elif k in self.stages:
            hidden, segment = self.reduce(k, hidden)
            self.segments.append(segment)
        else:
            self.segments.append(self.segments[-1])
        segment = self.segments[k]
        if segment is self.segments[0]:
            return hidden, {}
        if not hasattr(self.layers.layers[k], "self_attn"):
            return hidden, {"attention_mask": segment.valid}
        return hidden, {
            "attention_mask": self.layers.mask(segment.valid, hidden, 0),
            "position_embeddings": (segment.cos, segment.sin),
            "position_ids": segment.given_positions,
        }

    def after_layer(self, k: int, output: Tensor) -> Tensor:
        if k < len(self.deepstack):
            output = output + self.deepstack[k].to(output.device)
        if self.layers.form is not None:
            self.seen.output = output
        return output

    @property
    def per_layer(self) -> list[list[int]]:
        """Number of visual tokens in each layer, one list per prompt."""
        return [list(counts) for counts in zip(*(segment.n_visual for segment in self.segments), strict=True)]

    @property
    def kept(self) -> Iterator[Tensor]:
        """Indices of the visual tokens in the last layer, among all of the prompt, without merged tokens."""
        segment = self.segments[-1]
        return left(segment.visual, segment.columns, self.prompts.is_visual)

    def first_segment(self, kwargs: dict[str, Any]) -> Segment:
        valid, position_ids = self.short.valid, kwargs.get("position_ids")
        cos, sin = (x.expand(*valid.shape, -1) for x in kwargs["position_embeddings"])
        if self.layers.form is not None and self.renumbers:
            places = torch.arange(valid.shape[1], device=cos.device)[None] if position_ids is None else position_ids
            self.layers.form.check_rotary(self.embeds, places, cos, sin)
        return Segment(
            valid=valid,
            visual=self.short.is_visual & valid,
            columns=self.short.columns,
            cos=cos,
            sin=sin,
            position_ids=None if position_ids is None else _columns_first(position_ids, valid),
            n_visual=self.counts,
        )

    def reduce(self, k: int, hidden: Tensor) -> tuple[Tensor, Segment]:
        """Let the method select tokens for each prompt, and build the next segment and its input."""
        old, plans, n_visual = self.segments[-1].to(hidden.device), [], []
        for b, n in enumerate(self.prompts.budgets):
            pruned = n < self.counts[b]
            with torch.no_grad():
                reduction = self.layers.pruner.reduce(self.view(k, b, hidden, old), n) if pruned else None
            n_visual.append(old.n_visual[b] if reduction is None else reduction.n_rows)
            plans.append(_plan(old.valid[b], old.visual[b], reduction))
        self.calls.pop(k)

        def take(rows: Tensor) -> Tensor:
            return _left_pad([x[plan.place] for x, plan in zip(rows, plans, strict=True)])

        def merge(rows: Tensor) -> Tensor:
            return _left_pad([plan(x) for x, plan in zip(rows, plans, strict=True)])

        self.deepstack[k:] = [merge(rows.to(hidden.device)) for rows in self.deepstack[k:]]
        valid = _left_pad([torch.ones_like(plan.index, dtype=torch.bool) for plan in plans])
        merged = _left_pad([plan.index >= old.valid.shape[1] for plan in plans])
        position_ids = old.position_ids
        if self.renumbers:
            position_ids = valid.cumsum(1).sub(1).clamp_min(0)
            cos, sin = self.layers.model.rotary_emb(hidden, position_ids)
        else:
            cos, sin = take(old.cos), take(old.sin)
            position_ids = None if position_ids is None else take(position_ids)
        columns = take(old.columns).masked_fill(merged | ~valid, -1)
        return merge(hidden), Segment(valid, take(old.visual), columns, cos, sin, position_ids, n_visual)

    def view(self, k: int, b: int, hidden: Tensor, segment: Segment) -> DecoderView:
        """Prompt b at the input of layer k, without its padding."""
        rows, entered = segment.valid[b], self.short.valid[b]
        cos, sin = segment.cos[b, rows][:, None], segment.sin[b, rows][:, None]
        attn = self.layers.layers[k - 1].self_attn
        form, projected = self.layers.form, self.calls[k][:2]
        if form is not None:
            form.check_projections(k - 1, [call.output for call in projected], segment.valid.shape[1])
        q, keys = (call.output[b, rows].view(len(cos), -1, attn.head_dim) for call in projected)
        rotate: Rotate = halves
        if form is not None:
            rotate = form.rotation(k - 1, self.calls[k][2].kwargs, (b, rows), cos, sin)
        keys = rotate(keys, cos, sin)

        return DecoderView(
            layer=k,
            n_layers=len(self.layers),
            n_start=self.counts[b],
            hidden=hidden[b, rows],
            visual=segment.visual[b, rows],
            attention=lambda at: attention(rotate(q[at], cos[at], sin[at]), keys, at, attn.scaling),
            keys=keys,
            norm=self.layers.model.norm,
            prompt=self.embeds[b, entered].to(hidden.device),
            prompt_visual=self.short.is_visual[b, entered].to(hidden.device),
            encoder_attention=None if self.prompts.attention is None else self.prompts.attention[b],
            memory=self.memory[b],
        )


def _plan(valid: Tensor, visual: Tensor, reduction: Reduction | None) -> _Plan:
    none = torch.zeros(0, len(valid), device=valid.device)
    if reduction is None:
        rows = valid.nonzero()[:, 0]
        return _Plan(rows, rows, none)
    of_visual = (valid & visual).nonzero()[:, 0]
    keep = valid & ~visual
    keep[of_visual[reduction.indices]] = True
    index = keep.nonzero()[:, 0]
    if reduction.merge is None:
        return _Plan(index, index, none)
    before, after = index[index <= of_visual[-1]], index[index > of_visual[-1]]
    merged = len(valid) + torch.arange(len(reduction.merge), device=valid.device)
    weights = torch.zeros(len(merged), len(valid), device=valid.device)
    weights[:, of_visual] = reduction.merge
    return _Plan(torch.cat([before, merged, after]), torch.cat([before, of_visual[reduction.centres], after]), weights)


def _columns_first(position_ids: Tensor, valid: Tensor) -> Tensor:
    """Positions [B, n], or [P, B, n] as [B, n, P]."""
    if position_ids.ndim == 2:
        return position_ids.expand(valid.shape)
    return position_ids.expand(-1, *valid.shape).movedim(0, 2)


def _left_pad(rows: Sequence[Tensor]) -> Tensor:
    """Stack tensors [n_b, ..] of different lengths into [B, max n_b, ..], with zeros on the left."""
    length = max(len(x) for x in rows)
    stacked = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for b, x in enumerate(rows):
        stacked[b, length - len(x) :] = x
    return stacked
