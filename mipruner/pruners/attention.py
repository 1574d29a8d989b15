from dataclasses import dataclass

from torch import Tensor

from mipruner.features import Features
from mipruner.pruners.base import ScorePruner


@dataclass(frozen=True)
class AttentionPruner(ScorePruner):
    """The paper's "Attention" baseline: keeps the tokens with the highest encoder attention, eq. 5.

    The attention is the CLS row if the encoder has a CLS token. Otherwise it is the attention that a patch receives
    from the other patches.
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
