"""Cover: greedy search for tokens that cover question and image. Not in the paper: see docs/extensions.md."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mipruner import pmi
from mipruner.features import Features
from mipruner.fused import log_partition_of
from mipruner.pruners.base import Pruner
from mipruner.pruners.mi import check_ranges
from mipruner.selection import dense_greedy, lazy_greedy, take_rows

CERTAIN = 1 - 2**-20
"""Upper limit of p(t | v). Without it, after a token with p = 1 no other token would have a gain for this word."""


@dataclass(frozen=True)
class CoverPruner(Pruner):
    """Cover: greedy maximum of the coverage f(S) = lam T(S) / T(V) + (1 - lam) U(S) / U(V) over sets S of kept tokens.

    T(S) = sum_t [1 - prod_{v in S} (1 - p(t | v))] is the coverage of the question's words t, with p(t | v) of eq. 16
    over the vocabulary. U(S) = sum_u max_{v in S} p(u | v) is the coverage of all visual tokens u. V is the set of all
    visual tokens. f is monotone and submodular, so the greedy search reaches at least 1 - 1/e of the largest f.

    Parameters
    ----------
    lam : float in [0, 1]
        Weight of the question (1) against the image (0).
    tau : float
        Temperature of eq. 15, in T and U.
    vocabulary_rows : int, optional
        Estimate the sum over a large vocabulary from this many rows.
    """

    title = "Cover"
    reads = "question, vocabulary"
    cost = "N² d + N W d, then T N² at most"

    lam: float = 0.65
    tau: float = 0.1
    vocabulary_rows: int | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"vocabulary"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self.lam, self.tau, self.vocabulary_rows)

    def order(self, features: Features, n_keep: int) -> Tensor:
        visual = features.visual
        partition = log_partition_of(features, self.tau, self.vocabulary_rows)
        says = pmi.log_conditional(visual, features.text, self.tau, log_partition=partition).exp()
        shows = pmi.log_conditional(visual, visual, self.tau).exp()
        return cover(says, shows, n_keep, self.lam)


def cover(says: Tensor, shows: Tensor, n_keep: int, lam: float) -> Tensor:
    """Greedy search for f: one sample at a time on a CPU, batched on other devices.

    Parameters
    ----------
    says : Tensor [.., n_visual, n_text]
        p(t | v); a row is a candidate v.
    shows : Tensor [.., n_visual, n_visual]
        p(u | v); a row is a candidate v.

    Returns
    -------
    Tensor [.., n_keep]
        Indices in the order of the picks; ties go to the lowest index.
    """
    if says.device.type != "cpu":
        f = Coverage(says, shows, lam)
        return dense_greedy(f.gains, f.add, n_keep)
    if says.dim() > 2:
        samples = zip(says.flatten(0, -3), shows.flatten(0, -3), strict=True)
        return torch.stack([cover(*sample, n_keep, lam) for sample in samples]).view(*says.shape[:-2], n_keep)
    f = Coverage(says, shows, lam)
    return lazy_greedy(f.gains, f.add, len(says), n_keep)


class Coverage:
    """Objective f of `CoverPruner` for a growing set, with any leading batch dimensions."""

    def __init__(self, says: Tensor, shows: Tensor, lam: float):
        says = says.clamp_max(CERTAIN)
        tiny = torch.finfo(says.dtype).tiny
        of_all = -torch.expm1(torch.log1p(-says).sum(-2)).sum(-1)
        self.says = says * (lam / of_all.clamp_min(tiny))[..., None, None]
        self.shows = shows * ((1 - lam) / shows.amax(-2).sum(-1))[..., None, None]
        self.p = says
        self.unsaid = torch.ones_like(says[..., 0, :])
        """prod_{v in S} (1 - p(t | v)), [.., n_text]"""
        self.shown = torch.zeros_like(shows[..., 0, :])
        """max_{v in S} p(u | v), times the weight of U, [.., n_visual]"""

    def gains(self, index: Tensor | None = None) -> Tensor:
        """f(S + v) - f(S) for the candidates at ``index`` [.., k], or for all."""
        says, shows = self.says, self.shows
        if index is not None:
            says, shows = take_rows(says, index), take_rows(shows, index)
        words = (says * self.unsaid[..., None, :]).sum(-1)
        return words + (shows - self.shown[..., None, :]).clamp_min(0).sum(-1)

    def add(self, pick: Tensor) -> None:
        """Add the candidate ``pick`` [.., 1]."""
        self.unsaid = self.unsaid * (1 - take_rows(self.p, pick)[..., 0, :])
        self.shown = torch.maximum(self.shown, take_rows(self.shows, pick)[..., 0, :])
