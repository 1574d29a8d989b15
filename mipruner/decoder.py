"""Shortening the sequence inside the decoder, for methods that drop visual tokens between two layers.

    with shorten(language_model, pruner, is_visual, budgets) as run:
        ...prefill and decode, by `generate` or by hand...
    run.per_layer, run.kept

Short-lived hooks on a stock language model do everything: a pre-hook on a layer of `DecoderPruner.stages` replaces its
input by fewer rows, and all later layers get positions and a mask of that length, in the prefill and while decoding.
Nothing is masked out: later layers compute and cache less. Attention is recomputed for the rows that a method asks for,
from the outputs of the query and key projections, so any attention implementation does, and no weights are stored.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from mipruner.errors import InputError
from mipruner.pruners.base import DecoderPruner, DecoderView, Reduction

IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


@dataclass
class Run:
    """What happened in the last prefill.

    Attributes
    ----------
    per_layer : list of list of int
        Visual tokens that entered each layer, one list a prompt.
    kept : list of Tensor [n_kept]
        The visual tokens (counted over the prompt) that reached the last layer as themselves, merged ones left out.
    """

    per_layer: list[list[int]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)


def shorten(
    language_model: nn.Module,
    pruner: DecoderPruner,
    is_visual: Tensor,
    budgets: Sequence[int],
    encoder_attention: Sequence[Tensor] | None = None,
) -> "Shortening":
    """Prune inside ``language_model`` for as long as the context lasts: one prefill, and any number of decoding steps.

    Parameters
    ----------
    language_model : the text model of a transformers model, ``model.model.language_model``
    pruner : DecoderPruner
    is_visual : Tensor [B, S] bool
        The visual tokens of the left-padded prompts, not yet pruned.
    budgets : sequence of int
        Nominal number of visual tokens to keep of each prompt; a prompt that keeps all its tokens is left alone.
    encoder_attention : sequence of Tensor [n_visual], optional
        Of each prompt, for methods that need it.

    Raises
    ------
    InputError
        If the cache is not a `DynamicCache`, a stage lies beyond the last layer, or the attention implementation is not
        one of sdpa, eager and FlashAttention.
    """
    return Shortening(language_model, pruner, is_visual, budgets, encoder_attention)


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


class Shortening(ExitStack):
    """The context of `shorten`: entered, it gives the `Run`."""

    def __init__(self, model, pruner, is_visual, budgets, encoder_attention):
        super().__init__()
        self.model, self.pruner, self.layers = model, pruner, list(model.layers)
        self.is_visual, self.budgets, self.encoder_attention = is_visual, budgets, encoder_attention
        self.implementation = model.config._attn_implementation
        if self.implementation not in IMPLEMENTATIONS:
            raise InputError(f"pruning inside the decoder runs on {', '.join(IMPLEMENTATIONS)}: use sdpa")
        self.counts = is_visual.sum(1).tolist()
        self.pruned = [n < count for n, count in zip(budgets, self.counts, strict=True)]
        plans = [
            pruner.stages(count, n, len(self.layers))
            for n, count, pruned in zip(budgets, self.counts, self.pruned, strict=True)
            if pruned
        ]
        wanted = sorted({layer for plan in plans for layer in plan})
        # A method reads attention, which gated linear layers (Qwen3.5) do not have: its stage waits for one that has.
        after_attention = [k for k in range(1, len(self.layers)) if hasattr(self.layers[k - 1], "self_attn")]
        self.stages = {min(after) for layer in wanted if (after := [k for k in after_attention if k >= layer])}
        if wanted and (wanted[-1] >= len(self.layers) or not self.stages):
            raise InputError(f"cannot prune at layer {wanted[-1]} of a decoder of {len(self.layers)} layers")
        self.run = Run()

    def __enter__(self) -> Run:
        super().__enter__()
        for handle in self.hooks():
            self.callback(handle.remove)
        return self.run

    def hooks(self) -> Iterator[RemovableHandle]:
        yield self.model.register_forward_pre_hook(self.before_model, with_kwargs=True)
        for k, layer in enumerate(self.layers):
            yield layer.register_forward_pre_hook(partial(self.before_layer, k), with_kwargs=True)
            yield layer.register_forward_hook(partial(self.after_layer, k))
            if k + 1 in self.stages:
                for name in ("q", "k"):
                    attn = layer.self_attn
                    module = getattr(attn, f"{name}_norm") if hasattr(attn, "q_norm") else getattr(attn, f"{name}_proj")
                    yield module.register_forward_hook(partial(self.capture, name))

    def before_model(self, model, args, kwargs):
        """Note the prompt, and take deepstack over if tokens go before all of it is added."""
        cache, embeds = kwargs.get("past_key_values"), kwargs["inputs_embeds"]
        if cache is not None and (type(cache) is not DynamicCache or any(cache.is_sliding)):
            raise InputError(
                "pruning inside the decoder leaves a cache of its own length to each layer: use a DynamicCache without "
                f"sliding windows, not {type(cache).__name__}"
            )
        self.prefill = cache is None or cache.get_seq_length() == 0
        if not self.prefill:
            return None
        if embeds.shape[:2] != self.is_visual.shape:
            raise InputError(f"is_visual {tuple(self.is_visual.shape)} is not of this prompt {tuple(embeds.shape[:2])}")
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and mask.ndim != 2:
            raise InputError("pruning inside the decoder takes the padding as an attention mask [batch, length]")
        self.embeds, self.valid = embeds, torch.ones_like(self.is_visual) if mask is None else mask.bool()
        self.renumbers = self.pruner.renumbers and not (position_ids is not None and position_ids.ndim == 3)
        self.segments: list[_Segment] = []
        self.memory = [{} for _ in self.budgets]
        self.captured: dict[str, Tensor] = {}
        self.run.per_layer[:] = [[] for _ in self.budgets]
        deepstack, self.deepstack = kwargs.get("deepstack_visual_embeds") or [], []
        if not self.stages or min(self.stages) >= len(deepstack):
            return None
        slots = kwargs["visual_pos_masks"][..., None]
        self.deepstack = [torch.zeros_like(embeds).masked_scatter(slots, rows.to(embeds)) for rows in deepstack]
        return args, kwargs | {"visual_pos_masks": None, "deepstack_visual_embeds": None}

    def before_layer(self, k, layer, args, kwargs):
        """Hand layer k fewer rows if it is a stage, and from the first stage on positions and mask of what is left."""
        hidden = args[0]
        if self.prefill:
            if k == 0:
                segment = self.first_segment(kwargs)
            elif k in self.stages:
                hidden, segment = self.reduce(k, hidden)
            else:
                segment = self.segments[-1]
            self.segments.append(segment)
            for counts, n in zip(self.run.per_layer, segment.n_visual, strict=True):
                counts.append(n)
            if k == len(self.layers) - 1:
                self.run.kept[:] = [origin[origin >= 0] for origin in segment.origin]
                del self.embeds
        segment = self.segments[k]
        if segment is self.segments[0]:
            return None
        if not hasattr(layer, "self_attn"):
            return (hidden, *args[1:]), kwargs | {"attention_mask": segment.valid if self.prefill else None}
        n_past = 0 if self.prefill else kwargs["past_key_values"].get_seq_length(k)
        changes = {"attention_mask": self.mask(segment, hidden, n_past)}
        if self.prefill:
            changes |= {"position_embeddings": (segment.cos, segment.sin), "position_ids": segment.position_ids}
        elif self.renumbers:
            n_new = n_past - segment.valid.shape[1]  # tokens decoded before
            position_ids = segment.valid.sum(1, keepdim=True) + n_new
            position_ids = (position_ids + torch.arange(hidden.shape[1], device=position_ids.device)).to(hidden.device)
            changes |= {
                "position_embeddings": self.model.rotary_emb(hidden, position_ids),
                "position_ids": position_ids,
            }
        return (hidden, *args[1:]), kwargs | changes

    def after_layer(self, k, layer, args, output):
        if self.prefill and k < len(self.deepstack):
            return output + self.deepstack[k].to(output.device)
        return None

    def capture(self, name, module, args, output):
        if self.prefill:
            self.captured[name] = output

    def first_segment(self, kwargs) -> _Segment:
        shape, visual = self.valid.shape, self.is_visual & self.valid
        cos, sin = (x.expand(*shape, -1) for x in kwargs["position_embeddings"])
        position_ids = kwargs.get("position_ids")
        return _Segment(
            valid=self.valid,
            visual=visual,
            origin=torch.where(visual, visual.cumsum(1) - 1, -1),
            cos=cos,
            sin=sin,
            position_ids=None if position_ids is None else position_ids.expand(shape),
            n_visual=self.counts,
        )

    def reduce(self, k: int, hidden: Tensor) -> tuple[Tensor, _Segment]:
        """Let the method choose for each prompt, and build the next segment and its input."""
        old, plans, n_visual = self.segments[-1].to(hidden.device), [], []
        for b, (budget, pruned) in enumerate(zip(self.budgets, self.pruned, strict=True)):
            with torch.no_grad():
                reduction = self.pruner.reduce(self.view(k, b, hidden, old), budget) if pruned else None
            n_visual.append(old.n_visual[b] if reduction is None else reduction.n_rows)
            plans.append(_plan(old.valid[b], old.visual[b], reduction))
        self.captured.clear()

        def take(rows: Tensor) -> Tensor:
            return _left_pad([x[plan.place] for x, plan in zip(rows, plans, strict=True)])

        def merge(rows: Tensor) -> Tensor:
            return _left_pad([plan(x) for x, plan in zip(rows, plans, strict=True)])

        self.deepstack[k:] = [merge(rows.to(hidden.device)) for rows in self.deepstack[k:]]
        valid = _left_pad([torch.ones_like(plan.index, dtype=torch.bool) for plan in plans])
        merged = _left_pad([plan.index >= old.valid.shape[1] for plan in plans])
        visual = take(old.visual)
        position_ids = old.position_ids
        if self.renumbers:
            position_ids = valid.cumsum(1).sub(1).clamp_min(0)
            cos, sin = self.model.rotary_emb(hidden, position_ids)
        else:
            cos, sin = take(old.cos), take(old.sin)
            position_ids = None if position_ids is None else take(position_ids)
        origin = take(old.origin).masked_fill(merged | ~visual, -1)
        return merge(hidden), _Segment(valid, visual, origin, cos, sin, position_ids, n_visual)

    def view(self, k: int, b: int, hidden: Tensor, segment: _Segment) -> DecoderView:
        """Prompt b at the input of layer k, without its padding."""
        rows = segment.valid[b]
        cos, sin = segment.cos[b, rows][:, None], segment.sin[b, rows][:, None]
        attn = self.layers[k - 1].self_attn
        q, keys = (self.captured[name][b, rows].view(len(cos), -1, attn.head_dim) for name in ("q", "k"))
        keys = _rotate(keys, cos, sin)

        def attention(queries: Tensor) -> Tensor:
            shared = keys.float().repeat_interleave(q.shape[1] // keys.shape[1], 1)
            logits = torch.einsum("rhd,nhd->hrn", _rotate(q[queries], cos[queries], sin[queries]).float(), shared)
            later = torch.arange(len(keys), device=keys.device) > queries[:, None]
            return (logits * attn.scaling).masked_fill(later, -torch.inf).softmax(-1)

        return DecoderView(
            layer=k,
            n_layers=len(self.layers),
            n_start=self.counts[b],
            hidden=hidden[b, rows],
            visual=segment.visual[b, rows],
            attention=attention,
            keys=keys,
            norm=self.model.norm,
            prompt=self.embeds[b, self.valid[b]].to(hidden.device),
            prompt_visual=self.is_visual[b, self.valid[b]].to(hidden.device),
            encoder_attention=None if self.encoder_attention is None else self.encoder_attention[b],
            memory=self.memory[b],
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
