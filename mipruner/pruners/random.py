from dataclasses import dataclass

import torch
from torch import Tensor

from mipruner import draws
from mipruner.features import Features
from mipruner.pruners.base import ScorePruner


@dataclass(frozen=True)
class RandomPruner(ScorePruner):
    """Keeps random tokens. The draw depends only on the seed and the name of the sample.

    The paper averages three draws; use the seeds 0, 1 and 2.
    """

    title = "Random"
    reads = "nothing"
    reads_text = False
    cost = "none"

    seed: int = 0

    def score(self, features: Features) -> Tensor:
        generator = draws.generator(self.seed, features.sample)
        return torch.rand(features.visual.shape[:-1], generator=generator).to(features.visual.device)
