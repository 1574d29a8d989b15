from dataclasses import dataclass

from torch import Tensor

from mipruner.features import Features
from mipruner.pmi import similarity
from mipruner.pruners.base import ScorePruner


@dataclass(frozen=True)
class SimilarityPruner(ScorePruner):
    """The paper's "Similarity" baseline: keeps the tokens with the highest cosine (eq. 15) to any text token.

    The paper does not say how it aggregates over the text. The maximum corresponds to eq. 19.
    """

    title = "Similarity"
    reads = "question"
    cost = "N m d"
    static = True

    def score(self, features: Features) -> Tensor:
        return similarity(features.visual, features.text).amax(-1)
