from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.pruners.base import Pruner
from mipruner.selection import Selection, take_rows, top_k

STEP = 8
"""Number of tokens that one round of duplicate removal drops."""


@dataclass(frozen=True)
class VisPruner(Pruner):
    """VisPruner: important tokens by encoder attention, and diverse tokens by removing duplicates among the rest.

    Differs from the public code where that raises an error: an odd number of tokens is split with one token more on the
    side that loses tokens, and a round never removes more tokens than that side has.

    Parameters
    ----------
    important : float in [0, 1]
        Share of the budget for important tokens: ``int(important * n_keep)`` tokens.
    """

    title = "VisPruner"
    paper = "https://arxiv.org/abs/2412.01818"
    reads = "encoder attention, features before the projector"
    reads_text = False
    cost = "one row of encoder attention, N³ d / 96"

    important: float = 0.5
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "hidden"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise InputError(f"important={self.important} is not in [0, 1]")

    def select(self, features: Features, n_keep: int) -> Selection:
        assert features.attention is not None and features.hidden is not None
        n_important = int(self.important * n_keep)
        order = top_k(features.attention, features.n_visual)  # and so in order of attention
        rest = _distinct(features.hidden.float(), order[..., n_important:], n_keep - n_important)
        return Selection(torch.cat([order[..., :n_important], rest], -1).sort(-1).values)


def _distinct(hidden: Tensor, rest: Tensor, n_keep: int) -> Tensor:
    """Reduce ``rest`` [.., n] to n_keep tokens.

    Each round splits the tokens into two halves and drops those of one half that are most similar to the other half.
    """
    if n_keep == 0:
        return rest[..., :0]
    rows = normalize(hidden, dim=-1)
    while rest.shape[-1] > n_keep:
        a, b = rest[..., ::2], rest[..., 1::2]
        likeness = (take_rows(rows, a) @ take_rows(rows, b).mT).amax(-1)
        drop = min(STEP, rest.shape[-1] - n_keep, a.shape[-1])
        survivors = top_k(likeness, a.shape[-1])[..., drop:]
        rest = torch.cat([a.gather(-1, survivors), b], -1)  # not sorted again: the next round splits differently
    return rest
