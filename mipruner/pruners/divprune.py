from dataclasses import dataclass

import torch
from torch import Tensor

from mipruner.features import Features
from mipruner.fused import self_similarity
from mipruner.pruners.base import Pruner
from mipruner.selection import take_rows


@dataclass(frozen=True)
class DivPruner(Pruner):
    """DivPrune: a subset of visual tokens with a large smallest pairwise cosine distance (max-min diversity).

    Starts with the token whose nearest neighbour is farthest, then adds the token farthest from the kept tokens.

    Differs from the public code in never picking a token twice (there, tokens with equal features can repeat).
    """

    title = "DivPrune"
    paper = "https://arxiv.org/abs/2503.02175"
    reads = "nothing"
    reads_text = False
    cost = "N² d + T N"

    def order(self, features: Features, n_keep: int) -> Tensor:
        distance = self_similarity(features.visual).neg_().add_(1)
        score = distance.topk(2, dim=-1, largest=False).values[..., 1]  # the smallest distance is to the token itself
        nearest = torch.full_like(score, torch.inf)
        taken = torch.zeros_like(score, dtype=torch.bool)
        picks = []
        for _ in range(n_keep):
            pick = score.masked_fill(taken, -torch.inf).argmax(-1, keepdim=True)
            picks.append(pick)
            taken.scatter_(-1, pick, True)
            row = take_rows(distance, pick)[..., 0, :]
            score = nearest = torch.minimum(nearest, row)
        return torch.cat(picks, -1)
