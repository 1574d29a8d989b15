from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.pruners.base import Pruner
from mipruner.selection import Selection, take_rows, top_k

EXACT = "donot_use_mm_for_euclid_dist"


@dataclass(frozen=True)
class TrimTokenatorPruner(Pruner):
    """TrimTokenator: keeps the tokens closest to the text, then among them a subset with large pairwise distances.

    Stage 1 ranks by minus the distance to the text, which is mutual information up to constants if v given t is
    Gaussian. Stage 2 always adds the candidate with the largest summed distance to what is kept (greedy maximum of the
    expected pairwise distance).

    The authors published no code. Differs from the paper in what it leaves open, and neither reading is sure. ``port``
    is what a third party's public port reads: squared L2 distance of the rows as they are, mean over the text;
    ``int(share N)`` candidates, or T if that is more; first the candidate of the lowest mean cosine to all of them,
    then by 1 - cosine. ``unit`` scales rows to unit length, takes the mean L2 distance to the text, leaves
    ``multiple`` T candidates, starts from the best aligned one and adds by L2 distance.

    Parameters
    ----------
    reading : "port" or "unit"
    share : float in (0, 1]
        ``port``: share of the visual tokens that stage 1 leaves.
    multiple : float, at least 1
        ``unit``: tokens that stage 1 leaves, as a multiple of the budget.
    """

    title = "TrimTokenator"
    paper = "https://arxiv.org/abs/2509.00320"
    reads = "question"
    cost = "N m d + N² d"

    reading: str = "port"
    share: float = 0.8
    multiple: float = 2.0

    def __post_init__(self) -> None:
        if self.reading not in ("port", "unit"):
            raise InputError(f"unknown reading {self.reading!r}: choose port or unit")
        if not 0 < self.share <= 1:
            raise InputError(f"share={self.share} is not in (0, 1]")
        if not self.multiple >= 1:
            raise InputError(f"multiple={self.multiple} is below 1")

    def select(self, features: Features, n_keep: int) -> Selection:
        aligned, distance, spread = (self._port if self.reading == "port" else self._unit)(features, n_keep)
        taken = torch.zeros_like(spread, dtype=torch.bool)
        for k in range(n_keep):
            pick = spread.masked_fill(taken, -torch.inf).argmax(-1, keepdim=True)
            taken.scatter_(-1, pick, True)
            row = take_rows(distance, pick)[..., 0, :]
            spread = row if k == 0 else spread + row
        return Selection(aligned[taken].reshape(*taken.shape[:-1], n_keep).sort(-1).values)

    def _port(self, features: Features, n_keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates [.., c] of stage 1, their distances [.., c, c], and the score [.., c] of the first pick."""
        visual, text = features.visual.float(), features.text.float()
        far = torch.cdist(visual, text, compute_mode=EXACT).square().mean(-1)
        aligned = top_k(-far, max(n_keep, int(self.share * features.n_visual)))
        rows = normalize(take_rows(visual, aligned), dim=-1)
        distance = 1 - rows @ rows.mT
        return aligned, distance, distance.mean(-1)

    def _unit(self, features: Features, n_keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same with unit rows; the first pick is candidate 0, the best aligned."""
        visual, text = (normalize(rows.float(), dim=-1) for rows in (features.visual, features.text))
        aligned = top_k(-torch.cdist(visual, text).mean(-1), min(round(self.multiple * n_keep), features.n_visual))
        rows = take_rows(visual, aligned)
        distance = torch.cdist(rows, rows)
        return aligned, distance, torch.zeros_like(distance[..., 0])
