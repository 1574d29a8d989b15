"""KV caches that store which tokens of their prompts were kept.

The caller (usually ``generate``) counts the tokens of the full prompt, and the language model counts the remaining
tokens. So the cache reports a different length to each of them. It can only be filled in a call that a `Shortening`
serves. Methods that select, repeat or crop rows of the cache do the same with the stored state.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from mipruner.errors import InputError


@dataclass
class CacheState:
    """State of a cache with shortened prompts: remaining columns and positions.

    Attributes
    ----------
    owner : Shortening
        The context that shortened the prompts and serves the following calls.
    removed : int
        Number of columns of the full prompts that the first layer's cache does not have.
    last : Tensor [P, B]
        Position of the last token of each prompt.
    layers : list of Tensor [B, n] bool
        For each layer, which columns of its cache after the prompt are not padding; one entry if all layers are equal.
    renumbered : bool
        Whether layers after the first stage renumber positions.
    is_open : bool
        Whether the question that pruned the prompts had no end yet.
    serving : bool
        True during a call of the language model on the cache.
    """

    owner: object
    removed: int
    last: Tensor
    layers: list[Tensor]
    renumbered: bool = False
    is_open: bool = False
    serving: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        full = {id(valid): bool(valid.all()) for valid in self.layers}
        self.full = [full[id(valid)] for valid in self.layers]

    @property
    def valid(self) -> Tensor:
        """Valid columns of the first layer."""
        return self.layers[0]

    @property
    def padded(self) -> bool:
        return not self.full[0]

    @property
    def is_staged(self) -> bool:
        """Whether later layers hold fewer columns than the first."""
        return len(self.layers) > 1

    def select(self, rows: Tensor) -> "CacheState":
        """State of a selection of batch rows."""
        known: dict[int, Tensor] = {id(valid): valid[rows.to(valid.device)] for valid in self.layers}
        layers = [known[id(valid)] for valid in self.layers]
        return replace(self, last=self.last[:, rows.to(self.last.device)], layers=layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CacheState":
        return replace(self, serving=False)


if TYPE_CHECKING:
    Mixed = Cache
else:
    Mixed = object


class _Short(Mixed):
    """Mixin of a cache that converts lengths between full and short prompts."""

    pruning_state: CacheState

    def get_seq_length(self, layer_idx: int = 0) -> int:
        n = super().get_seq_length(layer_idx)
        if self.pruning_state.serving:
            return n
        if layer_idx and self.pruning_state.is_staged:
            n += self.pruning_state.valid.shape[1] - self.pruning_state.layers[layer_idx].shape[1]
        return n + self.pruning_state.removed

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        n, offset = super().get_mask_sizes(*args, **kwargs)
        counts_all = not (self.pruning_state.serving or self.is_compileable)
        return n + self.pruning_state.removed * counts_all, offset

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.pruning_state.serving:
            raise InputError(
                "this cache holds a prompt that mipruner.prune shortened, and its context has ended: use it inside, or "
                "start with an empty cache"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens: int) -> None:
        full = self.get_seq_length()
        tokens = tokens if tokens <= 0 else min(tokens - full, 0)  # before 5.20: the remaining length
        if full + tokens < self.pruning_state.valid.shape[1] + self.pruning_state.removed:
            raise InputError("a shortened prompt cannot be cropped: only what came after it")
        if tokens:
            super().crop(tokens)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.pruning_state = self.pruning_state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.pruning_state = self.pruning_state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        rows = torch.arange(self.pruning_state.last.shape[1], device=self.pruning_state.last.device)
        self.pruning_state = self.pruning_state.select(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        del self.pruning_state
        self.__class__ = type(self).__bases__[1]


@lru_cache
def _short(cls: type) -> type:
    return type(cls.__name__, (_Short, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def mark(cache: Cache, state: CacheState) -> None:
    """Store on a cache which tokens of its prompts were kept."""
    if not isinstance(cache, _Short):
        cache.__class__ = _short(type(cache))  # type: ignore[arg-type]
    cast(_Short, cache).pruning_state = state


def state_of(cache: Cache | None) -> CacheState | None:
    return getattr(cache, "pruning_state", None) if isinstance(cache, _Short) else None


def length(cache: Cache | None) -> int:
    """Number of columns in the cache."""
    if cache is None:
        return 0
    n, state = int(cache.get_seq_length()), state_of(cache)
    return n if state is None or state.serving else n - state.removed


def is_dynamic(cache: Cache) -> bool:
    """Whether the layers of the cache may have different lengths."""
    own = type(cache).__bases__[1] if isinstance(cache, _Short) else type(cache)
    return own is DynamicCache and not any(cache.is_sliding)
