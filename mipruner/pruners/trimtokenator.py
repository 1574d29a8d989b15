from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.pruners.base import Pruner
from mipruner.selection import Selection, take_rows, top_k


@dataclass(frozen=True)
class TrimTokenatorPruner(Pruner):
    """TrimTokenator: first the tokens closest to the text, then among those the subset that is widest apart.

    Stage 1 ranks by minus the L2 distance to the text, which is mutual information up to constants if v given t is
    Gaussian. Stage 2 starts from the best aligned token and always adds the one with the largest summed distance to
    what is kept (greedy maximum of the expected pairwise distance).

    Differs from the paper in what could not be recovered from it, there being no public code: rows are scaled to unit
    length first, the distance to the text is the mean over its tokens, and stage 1 leaves a multiple of the budget.

    Parameters
    ----------
    candidates : float, at least 1
        Tokens that stage 1 leaves, as a multiple of the budget.
    """

    title = "TrimTokenator"
    paper = "https://arxiv.org/abs/2509.00320"
    reads = "question"
    cost = "N m d + T² d"

    candidates: float = 2.0

    def __post_init__(self):
        if not self.candidates >= 1:
            raise InputError(f"candidates={self.candidates} is below 1")

    def select(self, features: Features, n_keep: int) -> Selection:
        visual, text = (normalize(rows.float(), dim=-1) for rows in (features.visual, features.text))
        aligned = top_k(-torch.cdist(visual, text).mean(-1), min(round(self.candidates * n_keep), features.n_visual))
        rows = take_rows(visual, aligned)
        distance = torch.cdist(rows, rows)
        spread = torch.zeros_like(distance[..., 0])  # the first pick is candidate 0, the best aligned
        taken = torch.zeros_like(spread, dtype=torch.bool)
        for _ in range(n_keep):
            pick = spread.masked_fill(taken, -torch.inf).argmax(-1, keepdim=True)
            taken.scatter_(-1, pick, True)
            spread = spread + take_rows(distance, pick)[..., 0, :]
        return Selection(aligned[taken].reshape(*taken.shape[:-1], n_keep).sort(-1).values)
