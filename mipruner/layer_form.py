"""Checks whether the decoder layers of a model without an adapter can be shortened by methods inside the decoder.

`mipruner.stages` needs layers like Llama's: each is called as
``layer(hidden, attention_mask=, position_embeddings=, ...)`` on the output of the previous layer, with a causal mask,
and its attention can be computed from its query and key projections. These conditions are checked during the call. If
one is not met, the call is refused.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mipruner.errors import InputError

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]

CUT = {"attention_mask", "position_embeddings", "position_ids", "past_key_values"}
"""Arguments of a layer that are shortened."""
DEEPSTACK = {"visual_pos_masks", "deepstack_visual_embeds"}
ENTERS = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values", "input_ids", "labels"} | DEEPSTACK
"""Arguments of the language model that may have the length of the prompt."""
N_CHECKED = 24
"""Number of tokens whose attention is compared."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [n, n_heads, d_head] by cos, sin [n, 1, d_rotary] that pairs channels i and i + d_rotary /
    2.

    Only the first d_rotary channels are rotated.
    """
    a, b = x[..., : cos.shape[-1]].chunk(2, -1)
    return _turned(x, torch.cat([-b, a], -1), cos, sin)


def pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Like `halves`, but pairs channels 2 i and 2 i + 1 (GLM-4V, Ernie)."""
    turned = x[..., : cos.shape[-1]]
    return _turned(x, torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2), cos, sin)


def _turned(x: Tensor, crossed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos + crossed * sin, still], -1)


def attention(q: Tensor, keys: Tensor, at: Tensor, scaling: float) -> Tensor:
    """Causal attention [n_heads, r, n] of queries q [r, n_heads, d] at rows ``at`` [r] to keys [n, n_kv, d].

    Queries and keys are rotated. Computed in float32, or in float64 if they are.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    shared = keys.to(dtype).repeat_interleave(q.shape[1] // keys.shape[1], 1)
    logits = torch.einsum("rhd,nhd->hrn", q.to(dtype), shared)
    later = torch.arange(len(keys), device=keys.device) > at[:, None]
    return (logits * scaling).masked_fill(later, -torch.inf).softmax(-1)


@dataclass
class Seen:
    """State after the latest layer of one prefill.

    Attributes
    ----------
    output : Tensor, optional
        Output of the layer.
    n_added : int
        Number of layers to whose outputs the language model adds deepstack rows.
    mask : optional
        The latest attention mask that passed the check.
    """

    output: Tensor | None = None
    n_added: int = 0
    mask: Any = ()


class Form:
    """Decoder layers of a language model without an adapter.

    Raises
    ------
    InputError
        If modules or attributes are missing. The other methods raise it if a call does not meet the conditions.
    """

    def __init__(self, model_type: str, model: Any):
        self.model_type, self.model = model_type, model
        self.rotations: dict[int, Rotate] = {}
        parts = [
            name for name in ("layers", "norm", "rotary_emb") if not isinstance(getattr(model, name, None), nn.Module)
        ]
        if parts:
            self.refuse(f"{type(model).__name__} has no {', '.join(parts)}")
        kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
        if others := kinds - {"DynamicLayer", "LinearAttentionLayer"}:
            self.refuse(f"some of its layers have a cache of type {' or '.join(sorted(others))}")
        if model.config._attn_implementation not in ("sdpa", "eager"):
            self.refuse("only sdpa and eager attention tell which mask a layer has")
        for k, layer in enumerate(model.layers):
            attn: Any = getattr(layer, "self_attn", None)
            names = (
                () if attn is None and hasattr(layer, "linear_attn") else ("q_proj", "k_proj", "head_dim", "scaling")
            )
            if missing := [name for name in names if not hasattr(attn, name)]:
                self.refuse(f"the attention of layer {k} ({type(attn or layer).__name__}) has no {', '.join(missing)}")
            if hasattr(attn, "indexer"):
                self.refuse(f"the attention of layer {k} selects keys by itself")
            if not getattr(attn, "is_causal", True):
                self.refuse(f"the attention of layer {k} is not causal")

    def refuse(self, found: str) -> NoReturn:
        raise InputError(
            f"{self.model_type}: methods inside the language model need decoder layers like Llama's, and {found}: use "
            "mi, similarity, divprune, cdpruner or random; see docs/models.md"
        )

    def check_arguments(self, kwargs: dict[str, Any], n_visual: int) -> None:
        """Check the arguments of the language model for prompts of n tokens with n_visual visual tokens in total."""
        n = kwargs["inputs_embeds"].shape[1]
        for name, x in kwargs.items():
            if name not in ENTERS and any({n, n_visual} & set(one.shape) for one in _tensors(x)):
                self.refuse(f"the language model reads {name} for each token between its layers")
        if kwargs.get("deepstack_visual_embeds") is not None and not hasattr(self.model, "_deepstack_process"):
            self.refuse("the language model adds deepstack rows in a way that is not known")

    def check_call(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any], valid: Tensor, seen: Seen) -> None:
        """Check the arguments of layer ``k`` for prompts ``valid`` [B, n], before they are shortened."""
        n = valid.shape[1]
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3:
            self.refuse(f"layer {k} takes no tensor [batch, length, width] first")
        others = {f"positional argument {i}": x for i, x in enumerate(args[1:], 1)} | kwargs
        for name, x in others.items():
            if name not in CUT and any(n in one.shape for one in _tensors(x)):
                self.refuse(f"layer {k} reads {name} for each token")
        if seen.output is not None and not (k <= seen.n_added or _same(args[0], seen.output)):
            self.refuse(f"the input of layer {k} is not the output of layer {k - 1}")
        rotary = kwargs.get("position_embeddings")
        if not isinstance(rotary, tuple | list) or [x.ndim for x in rotary] != [3, 3]:
            self.refuse(f"layer {k} takes no position_embeddings (cos, sin) [batch, length, width]")
        mask = kwargs.get("attention_mask")
        if mask is not seen.mask:
            if not self._is_causal(mask, valid, hasattr(self.model.layers[k], "self_attn")):
                self.refuse(f"the attention mask of layer {k} is not the causal one")
            seen.mask = mask

    def _is_causal(self, mask: Any, valid: Tensor, attends: bool) -> bool:
        n = valid.shape[1]
        if not attends:
            return mask is None or (mask.ndim == 2 and torch.equal(mask.bool(), valid.to(mask.device)))
        if mask is None:
            return bool(valid.all())
        if mask.ndim != 4 or mask.shape[-2:] != (n, n):
            return False
        allowed = (mask if mask.dtype == torch.bool else mask == 0).expand(len(valid), -1, n, n)
        valid = valid.to(mask.device)
        wanted = valid[:, None] & torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
        return bool((allowed == wanted[:, None])[valid[:, None].expand(-1, allowed.shape[1], n)].all())

    def check_deepstack(self, output: Tensor, added: Tensor, kwargs: dict[str, Any]) -> None:
        """Check the rows that the language model adds to the output of its first layer."""
        theirs = self.model._deepstack_process(output, kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"][0])
        if not torch.equal(theirs, output + added):
            self.refuse("the language model adds deepstack rows in a way that is not known")

    def check_rotary(self, hidden: Tensor, position_ids: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Check that ``rotary_emb`` computes the position embeddings, for a method that renumbers tokens."""
        made: tuple[Tensor, ...] = ()
        if len(inspect.signature(self.model.rotary_emb.forward).parameters) == 2:
            with suppress(IndexError):  # Qwen3.5's in transformers 5.17 takes [3, batch, length] only
                made = self.model.rotary_emb(hidden, position_ids)
        if not made or not all(torch.equal(x.expand_as(y), y) for x, y in zip(made, (cos, sin), strict=True)):
            self.refuse("its position embeddings are not those of rotary_emb")

    def check_projections(self, k: int, outputs: list[Tensor], n: int) -> None:
        if any(
            x.ndim < 3 or x.shape[1] != n or x[0, 0].numel() % self.model.layers[k].self_attn.head_dim for x in outputs
        ):
            self.refuse(f"queries and keys of layer {k} have another shape")

    def rotation(self, k: int, given: dict[str, Any], own: tuple[int, Tensor], cos: Tensor, sin: Tensor) -> Rotate:
        """Rotary embedding for which `attention` equals the attention of layer ``k`` on a few tokens.

        Compared in float64, whatever the dtype of the model, unless its weights are quantized.

        Parameters
        ----------
        k : int
        given : dict
            Arguments of the attention module.
        own : (int, Tensor [S])
            Index of a prompt in the batch, and mask of its n tokens that are not padding.
        cos, sin : Tensor [n, 1, d_rotary]
        """
        if k not in self.rotations:
            if "hidden_states" not in given:
                self.refuse(f"the attention of layer {k} gets its input without a name")
            hidden, attn = given["hidden_states"][own], self.model.layers[k].self_attn
            some = torch.linspace(0, len(hidden) - 1, min(len(hidden), N_CHECKED), device=hidden.device).round().long()
            hidden, cos, sin = hidden[some], cos[some], sin[some]
            weights = [*attn.parameters(), *attn.buffers()]
            if any(x.is_meta for x in weights):
                self.refuse(f"the weights of layer {k} are offloaded")
            if exact := all(x.dtype in FLOATS for x in weights):
                hidden, cos, sin = hidden.double(), cos.double(), sin.double()
            theirs, q, keys = self._own_attention(k, _eager(attn, exact), given, hidden, cos[:, 0], sin[:, 0])
            at, error = torch.arange(len(some), device=hidden.device), {}
            for rotate in (halves, pairs):
                ours = attention(rotate(q, cos, sin), rotate(keys, cos, sin), at, attn.scaling)
                error[rotate] = float((ours - theirs).abs().sum(-1).mean()) if ours.shape == theirs.shape else 2.0
            best = min(error, key=lambda rotate: error[rotate])
            if not error[best] < (1e-4 if exact else 0.02):
                self.refuse(f"the attention of layer {k} does not follow from its queries and keys")
            self.rotations[k] = best
        return self.rotations[k]

    def _own_attention(
        self, k: int, attn: Any, given: dict[str, Any], hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention weights [n_heads, m, m], queries and keys [m, n_heads, d_head] of ``attn`` for hidden [m, d]."""
        m, projected = len(hidden), {}
        for name in projections(attn):
            getattr(attn, name).register_forward_hook(
                lambda module, args, out, name=name: projected.update({name: out})
            )
        mask = torch.full((m, m), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device).triu(1)
        others = {name: x for name, x in given.items() if name not in CUT | {"hidden_states"}}
        with torch.no_grad():
            _, weights, *_ = attn(
                hidden_states=hidden[None],
                attention_mask=mask[None, None],
                position_embeddings=(cos[None], sin[None]),
                past_key_values=None,
                **others,
            )
        if not isinstance(weights, Tensor):
            self.refuse(f"the attention of layer {k} tells no weights")
        outputs = [projected[name] for name in projections(attn)]
        self.check_projections(k, outputs, m)
        q, keys = (x.view(m, -1, attn.head_dim) for x in outputs)
        return weights[0], q, keys


def projections(attn: nn.Module) -> tuple[str, str]:
    """Names of the submodules that return queries and keys before the rotary embedding."""
    return ("q_norm", "k_norm") if hasattr(attn, "q_norm") else ("q_proj", "k_proj")


def _eager(attn: Any, exact: bool) -> Any:
    """A copy of an attention module that returns attention weights; in float64 if ``exact``, else sharing weights."""
    twin, config = _copied(attn, exact), copy.deepcopy(attn.config)
    config._attn_implementation = "eager"
    twin.config = config
    return twin.eval()


def _copied(module: nn.Module, exact: bool) -> nn.Module:
    """A copy without hooks of its own or of accelerate, which would run the original."""
    twin = copy.copy(module)
    state = vars(twin)
    if "_hf_hook" in state:
        del state["_hf_hook"], state["forward"]
    state |= {"_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    for name in ("_parameters", "_buffers") if exact else ():
        state[name] = {key: x if x is None else x.detach().double() for key, x in state[name].items()}
    state["_modules"] = {name: _copied(child, exact) for name, child in module._modules.items() if child is not None}
    return twin


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return [one for y in x for one in _tensors(y)]
    return [x] if isinstance(x, Tensor) else []


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b.to(a.device)))
