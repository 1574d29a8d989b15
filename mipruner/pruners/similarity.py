from dataclasses import dataclass

from torch import Tensor

from mipruner.features import Features
from mipruner.pmi import similarity
from mipruner.pruners.base import ScorePruner


@dataclass(frozen=True)
class SimilarityPruner(ScorePruner):
    """Keeps the tokens most similar to any token of the text: cosine of eq. 15, maximum over the text tokens.

    The paper does not say how its "Similarity" baseline aggregates over the text; the maximum is the analogue of
    eq. 19.
    """

    title = "Similarity"
    reads = "question"
    cost = "N m d"
    static = True

    def score(self, features: Features) -> Tensor:
        return similarity(features.visual, features.text).amax(-1)
