"""Shortening prompts on their way through a language model: at its door, and between two layers.

    with Shortening(language_model, pruner, choose) as run:
        ...prefill and decode, by `generate` or by hand...
    run.per_layer, run.kept

``choose`` is asked at each call what the prompts in it keep. Short-lived hooks on a stock language model do the rest.
At the door (stage 0) the tokens that a `Pruner` dropped never enter; a pre-hook on a layer of `DecoderPruner.stages`
replaces its input by fewer rows. Nothing is masked out: later layers compute and cache less. What became of a prompt
lies on its cache, a `Course`, and translates what the caller counts in the calls that follow, so that threads and chats
do not meet. Attention is recomputed for the rows that a method asks for, from outputs of the query and key projections.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from mipruner.errors import InputError
from mipruner.prompt import Encoded, collate, cut
from mipruner.pruners.base import DecoderPruner, DecoderView, Pruner, Reduction
from mipruner.selection import Selection

IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
COURSE = "_mipruner"
"""Attribute of a cache whose prompt was shortened, a `Course`."""


@dataclass
class Run:
    """What happened in the last prefill.

    Attributes
    ----------
    per_layer : list of list of int
        Visual tokens that entered each layer, one list a prompt; empty if none were dropped between layers.
    kept : list of Tensor [n_kept]
        The visual tokens (counted over the prompt) that reached the last layer as themselves, merged ones left out.
    """

    per_layer: list[list[int]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)


@dataclass
class Prompts:
    """What `choose` says of a call that brings prompts with pictures.

    Attributes
    ----------
    is_visual : Tensor [B, S] bool
        The visual tokens of the left-padded prompts, not yet pruned.
    budgets : sequence of int
        Nominal number of visual tokens to keep of each prompt, for a `DecoderPruner`.
    attention : sequence of Tensor [n_visual], optional
        The vision encoder's, of each prompt, for methods that need it.
    encoded, selections
        What is kept at the door of each prompt, and of each picture in it.
    """

    is_visual: Tensor
    budgets: Sequence[int] = ()
    attention: Sequence[Tensor] | None = None
    encoded: Sequence[Encoded] = ()
    selections: Sequence[Sequence[Selection]] = ()


@dataclass
class Door:
    """What the caller does not know of prompts that entered short.

    Attributes
    ----------
    valid : Tensor [B, n] bool
        The columns that the cache had when the prompt was in.
    removed : int
        How many more there are as the caller counts.
    last : Tensor [P, B]
        Position of the last column.
    dropped : Tensor [B]
        How much higher it is as the caller counts.
    """

    valid: Tensor
    removed: int
    last: Tensor
    dropped: Tensor

    def __post_init__(self):
        self.padded = not bool(self.valid.all())

    def since(self, n_past: int) -> int:
        """Columns that came after the prompt."""
        return n_past - self.valid.shape[1]

    def mask(self, mask: Tensor | None, n_past: int, n_new: int) -> Tensor:
        """Which of the cache's columns [B, n_past] count, from the caller's mask."""
        rest = self.valid.new_ones(len(self.valid), self.since(n_past))
        if mask is not None:
            expected = n_past + self.removed + n_new
            if mask.shape[1] != expected:
                raise InputError(f"the attention mask has {mask.shape[1]} columns where the prompt has {expected}")
            rest = mask[:, self.valid.shape[1] + self.removed :][:, : self.since(n_past)].bool()
        return torch.cat([self.valid, rest], 1)

    def positions(self, n_past: int, n_new: int) -> Tensor:
        """Positions [P, B, n_new] of text that follows."""
        ahead = 1 + self.since(n_past) + torch.arange(n_new, device=self.last.device)
        return self.last[..., None] + ahead

    def lag(self, position_ids: Tensor, n_past: int) -> int:
        """How many tokens at the front of a call, at these positions as the caller counts, are in the cache already."""
        row = self.last[0] + self.dropped if position_ids.ndim == 2 or len(position_ids) == 4 else self.last[-1]
        given = position_ids if position_ids.ndim == 2 else position_ids[0]
        return int(row[0]) + self.since(n_past) + given.shape[-1] - int(given[0, -1])


@dataclass
class Course:
    """What became of the prompts of a cache: at the door, and the rows that each layer saw."""

    door: Door | None = None
    segments: list["_Segment"] = field(default_factory=list)


@dataclass
class _Segment:
    """The sequence between two stages, as the prefill saw it: n rows a prompt, padded on the left.

    origin tells which of the prompt's visual tokens a row is; text and merged rows are -1.
    """

    valid: Tensor  # [B, n] bool
    visual: Tensor  # [B, n] bool
    origin: Tensor  # [B, n]
    cos: Tensor  # [B, n, d_rotary]
    sin: Tensor
    position_ids: Tensor | None  # [B, n]
    n_visual: list[int]
    renumbered: bool = False

    def __post_init__(self):
        self.padded = not bool(self.valid.all())

    def to(self, device: torch.device) -> "_Segment":
        """For a model that is spread over several devices."""
        if self.valid.device == device:
            return self
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})


@dataclass
class _Plan:
    """Which rows of one prompt's old segment make up its new one."""

    index: Tensor  # [n_new] rows of the old one, merged rows counted on from its end
    place: Tensor  # [n_new] the row whose position each takes
    weights: Tensor  # [n_merged, n_old]

    def __call__(self, rows: Tensor) -> Tensor:
        """Apply to rows [n_old, d]."""
        if len(self.weights):
            rows = torch.cat([rows, (self.weights @ rows.float()).to(rows)])
        return rows[self.index]


@dataclass
class _Prefill:
    """Prompts between the door and the last layer, for a method that drops tokens on the way."""

    prompts: Prompts
    embeds: Tensor
    valid: Tensor
    renumbers: bool
    stages: set[int]
    pruned: list[bool]
    deepstack: list[Tensor]
    memory: list[dict]
    captured: dict[str, Tensor] = field(default_factory=dict)


class Shortening(ExitStack):
    """The context of hooks: entered, it gives the `Run`.

    Parameters
    ----------
    language_model : the text model of a transformers model, ``model.model.language_model``
    pruner : Pruner or DecoderPruner
    choose : callable
        From the call's keyword arguments and its cache's `Course` to `Prompts`, to None for a call that goes on, or to
        False for one that is none of ours.
    repack : bool
        Whether what enters short is numbered anew, see `Adapter`.

    Raises
    ------
    InputError
        If the cache is not a `DynamicCache`, a stage lies beyond the last layer, or the attention implementation is not
        one of sdpa, eager and FlashAttention.
    """

    def __init__(
        self,
        language_model: nn.Module,
        pruner: Pruner | DecoderPruner,
        choose: Callable[[dict[str, Any], Course | None], "Prompts | bool | None"],
        repack: bool = False,
    ):
        super().__init__()
        self.model, self.pruner, self.choose, self.repack = language_model, pruner, choose, repack
        self.layers = list(language_model.layers) if isinstance(pruner, DecoderPruner) else []
        self.implementation = language_model.config._attn_implementation
        if self.layers and self.implementation not in IMPLEMENTATIONS:
            raise InputError(f"pruning inside the decoder runs on {', '.join(IMPLEMENTATIONS)}: use sdpa")
        self.here = threading.local()
        self.run = Run()

    def __enter__(self) -> Run:
        super().__enter__()
        for handle in self.hooks():
            self.callback(handle.remove)
        return self.run

    def hooks(self) -> Iterator[RemovableHandle]:
        yield self.model.register_forward_pre_hook(self.before_model, with_kwargs=True)
        yield self.model.register_forward_hook(self.after_model)
        for k, layer in enumerate(self.layers):
            yield layer.register_forward_pre_hook(partial(self.before_layer, k), with_kwargs=True)
            yield layer.register_forward_hook(partial(self.after_layer, k))
            attn = getattr(layer, "self_attn", None)
            for name in ("q", "k") if attn is not None else ():
                module = getattr(attn, f"{name}_norm") if hasattr(attn, "q_norm") else getattr(attn, f"{name}_proj")
                yield module.register_forward_hook(partial(self.capture, k, name))

    # Of the whole model

    def before_model(self, model, args, kwargs):
        """Let in what is kept, or say where text that follows stands."""
        cache, here = kwargs.get("past_key_values"), self.here
        here.course = getattr(cache, COURSE, None) if length(cache) else None
        here.prefill = None
        prompts = self.choose(kwargs, here.course)
        if prompts is False:
            here.course = None
            return None
        if prompts is None:
            if here.course is None or here.course.door is None:
                return None
            return args, kwargs | self.follow(kwargs, here.course.door)
        changes, door = self.enter(prompts, kwargs, here.course and here.course.door)
        here.course = Course(door)
        if self.layers:
            changes |= self.begin(prompts, kwargs | changes)
        return args, kwargs | changes

    def after_model(self, model, args, output):
        course, self.here.course, self.here.prefill = self.here.course, None, None
        cache = getattr(output, "past_key_values", None)
        if course is not None and cache is not None:
            setattr(cache, COURSE, course)

    def enter(
        self, prompts: Prompts, kwargs: dict[str, Any], before: Door | None
    ) -> tuple[dict[str, Any], Door | None]:
        """Stage 0: the arguments of the short prompts, and what their caller does not know."""
        pairs = list(zip(prompts.encoded, prompts.selections, strict=True))
        shorts = [cut(*pair, repack=self.repack) for pair in pairs]
        merged = any(selection.embeds is not None for _, chosen in pairs for selection in chosen)
        same = all(len(s.embeds) == len(e.embeds) for s, e in zip(shorts, prompts.encoded, strict=True))
        if not pairs or (before is None and same and not merged):
            return {}, None
        cache, mask, shape = kwargs.get("past_key_values"), kwargs.get("attention_mask"), prompts.is_visual.shape
        n_past, batch = length(cache), collate(shorts)
        starts, ends = (torch.stack([e.position_ids[0, at] for e in prompts.encoded]) for at in (0, -1))
        position_ids = batch.position_ids
        if self.repack:
            position_ids = position_ids + (starts - (before.dropped if before else 0))[:, None]
        columns = torch.ones_like(batch.is_visual).long() if batch.attention_mask is None else batch.attention_mask
        if n_past:
            past = columns.new_ones(len(columns), n_past) if mask is None else mask[:, :n_past].long()
            past = before.mask(mask, n_past, shape[1]).long() if before else past
            columns = torch.cat([past, columns], 1)
        last = position_ids[..., -1]
        door = Door(
            valid=columns.bool(),
            removed=(before.removed if before else 0) + shape[1] - batch.embeds.shape[1],
            last=last[None] if last.ndim == 1 else last,
            dropped=ends - (last if last.ndim == 1 else last[0]),
        )
        # Without a cache, a mask is what tells gaps between positions from several prompts in one row.
        plain = mask is None and not door.padded and cache is not None
        return batch.language_model_inputs() | {
            "position_ids": position_ids,
            "attention_mask": None if plain else columns,
        }, door

    def follow(self, kwargs: dict[str, Any], door: Door) -> dict[str, Any]:
        """Positions and mask of text that follows a short prompt."""
        n_past, n_new = length(kwargs["past_key_values"]), kwargs["inputs_embeds"].shape[1]
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        columns = door.mask(mask, n_past, n_new)
        if mask is not None or door.padded:
            new = columns.new_ones(len(columns), n_new) if mask is None else mask[:, -n_new:].bool()
            mask = torch.cat([columns, new], 1).long()
        if getattr(self.here, "placed", False) and position_ids.ndim == 2:
            position_ids = position_ids - door.dropped[:, None]
        elif not getattr(self.here, "placed", False):
            position_ids = door.positions(n_past, n_new)
            position_ids = position_ids[0] if len(position_ids) == 1 else position_ids
        return {"attention_mask": mask, "position_ids": position_ids}

    def begin(self, prompts: Prompts, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Note the prompt, and take deepstack over if tokens go before all of it is added."""
        cache, embeds, mask = kwargs.get("past_key_values"), kwargs["inputs_embeds"], kwargs.get("attention_mask")
        if cache is not None and (type(cache) is not DynamicCache or any(cache.is_sliding)):
            raise InputError(
                "pruning inside the decoder leaves a cache of its own length to each layer: use a DynamicCache without "
                f"sliding windows, not {type(cache).__name__}"
            )
        if length(cache):
            raise InputError(
                "methods inside the language model start with the prompt: no pictures after a cached prefix"
            )
        if embeds.shape[:2] != prompts.is_visual.shape:
            raise InputError(
                f"is_visual {tuple(prompts.is_visual.shape)} is not of this prompt {tuple(embeds.shape[:2])}"
            )
        if mask is not None and mask.ndim != 2:
            raise InputError("pruning inside the decoder takes the padding as an attention mask [batch, length]")
        position_ids, counts = kwargs.get("position_ids"), prompts.is_visual.sum(1).tolist()
        pruned = [n < count for n, count in zip(prompts.budgets, counts, strict=True)]
        self.here.prefill = run = _Prefill(
            prompts,
            embeds,
            torch.ones_like(prompts.is_visual) if mask is None else mask.bool(),
            self.pruner.renumbers and not (position_ids is not None and position_ids.ndim == 3),
            self.stages([pair for pair in zip(counts, prompts.budgets, strict=True) if pair[1] < pair[0]]),
            pruned,
            [],
            [{} for _ in counts],
        )
        self.run.per_layer[:] = [[] for _ in counts]
        deepstack = kwargs.get("deepstack_visual_embeds") or []
        if not run.stages or min(run.stages) >= len(deepstack):
            return {}
        slots = kwargs["visual_pos_masks"][..., None]
        run.deepstack[:] = [torch.zeros_like(embeds).masked_scatter(slots, rows.to(embeds)) for rows in deepstack]
        return {"visual_pos_masks": None, "deepstack_visual_embeds": None}

    def stages(self, pairs: Sequence[tuple[int, int]]) -> set[int]:
        """Layers whose input is shortened, for prompts of (visual tokens, budget)."""
        wanted = sorted({layer for n_visual, n in pairs for layer in self.pruner.stages(n_visual, n, len(self.layers))})
        # A method reads attention, which gated linear layers (Qwen3.5) do not have: its stage waits for one that has.
        after_attention = [k for k in range(1, len(self.layers)) if hasattr(self.layers[k - 1], "self_attn")]
        stages = {min(after) for layer in wanted if (after := [k for k in after_attention if k >= layer])}
        if wanted and (wanted[-1] >= len(self.layers) or not stages):
            raise InputError(f"cannot prune at layer {wanted[-1]} of a decoder of {len(self.layers)} layers")
        return stages

    # Of one layer

    def before_layer(self, k, layer, args, kwargs):
        """Hand layer k fewer rows if it is a stage, and from the first stage on positions and mask of what is left."""
        hidden, course, run = args[0], self.here.course, self.here.prefill
        if course is None or (run is None and not course.segments):
            return None
        if run is not None:
            if k == 0:
                segment = self.first_segment(run, kwargs)
            elif k in run.stages:
                hidden, segment = self.reduce(run, k, hidden, course.segments[-1])
            else:
                segment = course.segments[-1]
            course.segments.append(segment)
            for counts, n in zip(self.run.per_layer, segment.n_visual, strict=True):
                counts.append(n)
            if k == len(self.layers) - 1:
                self.run.kept[:] = [origin[origin >= 0] for origin in segment.origin]
        segment = course.segments[k]
        if segment is course.segments[0]:
            return None
        if not hasattr(layer, "self_attn"):
            return (hidden, *args[1:]), kwargs | {"attention_mask": None if run is None else segment.valid}
        n_past = 0 if run is not None else kwargs["past_key_values"].get_seq_length(k)
        changes = {"attention_mask": self.mask(segment, hidden, n_past)}
        if run is not None:
            changes |= {"position_embeddings": (segment.cos, segment.sin), "position_ids": segment.position_ids}
        elif segment.renumbered:
            n_new = n_past - segment.valid.shape[1]  # tokens decoded before
            position_ids = segment.valid.sum(1, keepdim=True) + n_new
            position_ids = (position_ids + torch.arange(hidden.shape[1], device=position_ids.device)).to(hidden.device)
            changes |= {
                "position_embeddings": self.model.rotary_emb(hidden, position_ids),
                "position_ids": position_ids,
            }
        return (hidden, *args[1:]), kwargs | changes

    def after_layer(self, k, layer, args, output):
        run = self.here.prefill
        return output + run.deepstack[k].to(output.device) if run is not None and k < len(run.deepstack) else None

    def capture(self, k, name, module, args, output):
        run = self.here.prefill
        if run is not None and k + 1 in run.stages:
            run.captured[name] = output

    def first_segment(self, run: _Prefill, kwargs) -> "_Segment":
        shape, visual = run.valid.shape, run.prompts.is_visual & run.valid
        cos, sin = (x.expand(*shape, -1) for x in kwargs["position_embeddings"])
        position_ids = kwargs.get("position_ids")
        return _Segment(
            valid=run.valid,
            visual=visual,
            origin=torch.where(visual, visual.cumsum(1) - 1, -1),
            cos=cos,
            sin=sin,
            position_ids=None if position_ids is None else position_ids.expand(shape),
            n_visual=run.prompts.is_visual.sum(1).tolist(),
        )

    def reduce(self, run: _Prefill, k: int, hidden: Tensor, old: _Segment) -> tuple[Tensor, _Segment]:
        """Let the method choose for each prompt, and build the next segment and its input."""
        old, plans, n_visual = old.to(hidden.device), [], []
        for b, (budget, pruned) in enumerate(zip(run.prompts.budgets, run.pruned, strict=True)):
            with torch.no_grad():
                reduction = self.pruner.reduce(self.view(run, k, b, hidden, old), budget) if pruned else None
            n_visual.append(old.n_visual[b] if reduction is None else reduction.n_rows)
            plans.append(_plan(old.valid[b], old.visual[b], reduction))
        run.captured.clear()

        def take(rows: Tensor) -> Tensor:
            return _left_pad([x[plan.place] for x, plan in zip(rows, plans, strict=True)])

        def merge(rows: Tensor) -> Tensor:
            return _left_pad([plan(x) for x, plan in zip(rows, plans, strict=True)])

        run.deepstack[k:] = [merge(rows.to(hidden.device)) for rows in run.deepstack[k:]]
        valid = _left_pad([torch.ones_like(plan.index, dtype=torch.bool) for plan in plans])
        merged = _left_pad([plan.index >= old.valid.shape[1] for plan in plans])
        visual = take(old.visual)
        position_ids = old.position_ids
        if run.renumbers:
            position_ids = valid.cumsum(1).sub(1).clamp_min(0)
            cos, sin = self.model.rotary_emb(hidden, position_ids)
        else:
            cos, sin = take(old.cos), take(old.sin)
            position_ids = None if position_ids is None else take(position_ids)
        origin = take(old.origin).masked_fill(merged | ~visual, -1)
        return merge(hidden), _Segment(valid, visual, origin, cos, sin, position_ids, n_visual, run.renumbers)

    def view(self, run: _Prefill, k: int, b: int, hidden: Tensor, segment: _Segment) -> DecoderView:
        """Prompt b at the input of layer k, without its padding."""
        rows = segment.valid[b]
        cos, sin = segment.cos[b, rows][:, None], segment.sin[b, rows][:, None]
        attn = self.layers[k - 1].self_attn
        q, keys = (run.captured[name][b, rows].view(len(cos), -1, attn.head_dim) for name in ("q", "k"))
        keys = _rotate(keys, cos, sin)

        def attention(queries: Tensor) -> Tensor:
            shared = keys.float().repeat_interleave(q.shape[1] // keys.shape[1], 1)
            logits = torch.einsum("rhd,nhd->hrn", _rotate(q[queries], cos[queries], sin[queries]).float(), shared)
            later = torch.arange(len(keys), device=keys.device) > queries[:, None]
            return (logits * attn.scaling).masked_fill(later, -torch.inf).softmax(-1)

        return DecoderView(
            layer=k,
            n_layers=len(self.layers),
            n_start=int(run.prompts.is_visual[b].sum()),
            hidden=hidden[b, rows],
            visual=segment.visual[b, rows],
            attention=attention,
            keys=keys,
            norm=self.model.norm,
            prompt=run.embeds[b, run.valid[b]].to(hidden.device),
            prompt_visual=run.prompts.is_visual[b, run.valid[b]].to(hidden.device),
            encoder_attention=None if run.prompts.attention is None else run.prompts.attention[b],
            memory=run.memory[b],
        )

    def mask(self, segment: _Segment, hidden: Tensor, n_past: int) -> Tensor | None:
        """The mask [B, 1, n_query, n_past + n_query] of a layer, in the form that the implementation takes."""
        n_query = hidden.shape[1]
        n_keys = n_past + n_query
        valid = segment.valid.to(hidden.device)
        valid = torch.cat([valid, valid.new_ones(len(valid), n_keys - valid.shape[1])], 1)
        if self.implementation.startswith("flash"):
            return valid if segment.padded else None
        if not segment.padded and (n_query == 1 or (self.implementation == "sdpa" and n_past == 0)):
            return None
        key = torch.arange(n_keys, device=hidden.device)
        query = key[n_past:, None]
        allowed = (key <= query) & valid[:, None, None] | (key == query)  # a padding row sees itself: no NaN
        if self.implementation == "sdpa":
            return allowed
        return torch.where(allowed, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)


def shorten(language_model, pruner, is_visual, budgets, encoder_attention=None) -> Shortening:
    """A `Shortening` of prompts that are known beforehand, for one prefill and any number of decoding steps."""
    shortening = Shortening(
        language_model,
        pruner,
        lambda kwargs, course: (
            None if length(kwargs.get("past_key_values")) else Prompts(is_visual, budgets, encoder_attention)
        ),
    )
    counts = is_visual.sum(1).tolist()
    shortening.stages([(count, n) for count, n in zip(counts, budgets, strict=True) if n < count])
    return shortening


def length(cache) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


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


def _left_pad(rows: Sequence[Tensor]) -> Tensor:
    """Stack tensors [n_b, ..] of different lengths into [B, max n_b, ..], zeros first."""
    length = max(len(x) for x in rows)
    stacked = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for b, x in enumerate(rows):
        stacked[b, length - len(x) :] = x
    return stacked


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first d_rotary channels of x [n, n_heads, d_head] by cos, sin [n, 1, d_rotary]."""
    turned, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, still], -1)
