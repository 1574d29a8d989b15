from dataclasses import dataclass

from mipruner import pmi
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.fused import mi_picks
from mipruner.pruners.base import Pruner
from mipruner.selection import Selection, greedy


@dataclass(frozen=True)
class MIPruner(Pruner):
    """MI-Pruner, Algorithm 1: the greedy search for lam S_cross - (1 - lam) S_self over pointwise mutual information.

    Parameters
    ----------
    lam : float in [0, 1]
        Balance of relevance (1) and redundancy (0), eq. 22. The paper: 0.5 for open-ended questions, else 1.
    tau : float
        Temperature of eq. 15.
    aggregation : "max" (eq. 19-20) or "global" (eq. 21)
    normalization : "softmax" (eq. 16), "minmax" or "minmax_exact" (eq. 52-53), see `mipruner.pmi.log_conditional`
    """

    lam: float = 0.5
    tau: float = 0.1
    aggregation: pmi.Aggregation = "max"
    normalization: pmi.Normalization = "softmax"

    def __post_init__(self):
        if not 0 <= self.lam <= 1:
            raise InputError(f"lam={self.lam} is not in [0, 1]")
        if not self.tau > 0:
            raise InputError(f"tau={self.tau} is not positive")

    def select(self, features: Features, n_keep: int) -> Selection:
        return Selection(self.picks(features, n_keep).sort(-1).values)

    def picks(self, features: Features, n_keep: int, given=None):
        """Indices [.., n_keep] in the order of the greedy search, after the tokens ``given``."""
        if self.aggregation == "max" and self.normalization == "softmax":
            return mi_picks(features.visual, features.text, n_keep, self.lam, self.tau, given=given)
        options = (self.tau, self.aggregation, self.normalization)
        relevance = pmi.relevance(features.visual, features.text, *options)
        redundancy = None if self.lam == 1 else pmi.redundancy(features.visual, *options)
        return greedy(relevance, redundancy, n_keep, self.lam, aggregation=self.aggregation, given=given)
