from dataclasses import dataclass
from typing import Literal

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
    """TrimTokenator: selects the tokens closest to the text, then a subset of them with large pairwise distances.

    Stage 1 ranks by minus the distance to the text, which is mutual information up to constants if p(v | t) is
    Gaussian. Stage 2 adds the candidate with the largest summed distance to the kept tokens (greedy maximum of the
    expected pairwise distance).

    The authors published no code, and the paper does not specify all details. Differs from the paper in details that it
    does not specify; both readings are uncertain. ``port`` follows a public port by a third party: mean squared L2
    distance of the unscaled rows to the text; ``int(share N)`` candidates, or T if that is more; the first pick has the
    lowest mean cosine to all candidates; then 1 - cosine. ``unit`` scales rows to unit length: mean L2 distance to the
    text; ``multiple`` T candidates; the first pick is the best aligned one; then L2 distance.

    Parameters
    ----------
    reading : "port" or "unit"
    share : float in (0, 1]
        ``port``: share of the visual tokens after stage 1.
    multiple : float, at least 1
        ``unit``: number of tokens after stage 1, as a multiple of the budget.
    """

    title = "TrimTokenator"
    paper = "https://arxiv.org/abs/2509.00320"
    reads = "question"
    cost = "N m d + N² d"

    reading: Literal["port", "unit"] = "port"
    share: float = 0.8
    multiple: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
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
        """The same for unit rows. The first pick is candidate 0, the best aligned one."""
        visual, text = (normalize(rows.float(), dim=-1) for rows in (features.visual, features.text))
        aligned = top_k(-torch.cdist(visual, text).mean(-1), min(round(self.multiple * n_keep), features.n_visual))
        rows = take_rows(visual, aligned)
        distance = torch.cdist(rows, rows)
        return aligned, distance, torch.zeros_like(distance[..., 0])
