from dataclasses import dataclass

import torch

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.pruners.mi import MIPruner
from mipruner.selection import Selection, top_k


@dataclass(frozen=True)
class MIAttentionPruner(MIPruner):
    """MI-Attention: round 1 keeps tokens by encoder attention, round 2 adds picks of MI-Pruner's greedy search.

    The paper does not give the split between the rounds. The default, half, is that of VisPruner.

    Parameters
    ----------
    split : float in [0, 1]
        Share of the budget for round 1, ``round(split * n_keep)`` tokens.
    """

    title = "MI-Attention"
    reads = "question, encoder attention"
    cost = "N² d + T N, one row of encoder attention"

    split: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.split <= 1:
            raise InputError(f"split={self.split} is not in [0, 1]")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return super().needs | {"attention"}

    def order(self, features: Features, n_keep: int) -> None:
        return None  # the rounds depend on the budget

    def select(self, features: Features, n_keep: int) -> Selection:
        assert features.attention is not None
        attended = top_k(features.attention, round(self.split * n_keep))
        added = self.picks(features, n_keep - attended.shape[-1], given=attended)
        return Selection(torch.cat([attended, added], -1).sort(-1).values)
