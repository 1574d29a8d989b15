from dataclasses import dataclass

from torch import Tensor

from mipruner.features import Features
from mipruner.pruners.base import ScorePruner


@dataclass(frozen=True)
class AttentionPruner(ScorePruner):
    """Keeps the tokens with the most encoder attention, eq. 5: the paper's "Attention" baseline.

    The attention is the CLS row where the encoder has a CLS token, else the sum that other patches pay to each patch.
    """

    title = "Attention"
    reads = "encoder attention"
    reads_text = False
    cost = "one row of encoder attention"
    static = True

    needs = frozenset({"attention"})

    def score(self, features: Features) -> Tensor:
        assert features.attention is not None
        return features.attention
