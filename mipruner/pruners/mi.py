import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mipruner import fused, pmi
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.fused import log_partition_of, mi_picks
from mipruner.prior import Prior, visual_prior
from mipruner.pruners.base import Pruner
from mipruner.selection import greedy


def check_ranges(lam: float, tau: float, vocabulary_rows: int | None) -> None:
    """Raise `InputError` for a value out of range."""
    if not 0 <= lam <= 1:
        raise InputError(f"lam={lam} is not in [0, 1]")
    if not 0 < tau < math.inf:
        raise InputError(f"tau={tau} is not positive and finite")
    if vocabulary_rows is not None and vocabulary_rows < 1:
        raise InputError(f"vocabulary_rows={vocabulary_rows} is not positive")


@dataclass(frozen=True)
class MIPruner(Pruner):
    """MI-Pruner, Algorithm 1: greedy search for lam S_cross - (1 - lam) S_self with pointwise mutual information.

    With default options it is the method of the paper. ``support`` and ``prior`` are not in the paper.

    Parameters
    ----------
    lam : float in [0, 1]
        Weight of relevance (1) against redundancy (0), eq. 22. The paper uses 0.5 for open-ended questions, else 1.
    tau : float
        Temperature of eq. 15.
    aggregation : "max" (eq. 19-20) or "global" (eq. 21)
    normalization : "softmax" (eq. 16), "minmax" or "minmax_exact" (eq. 52-53), see `mipruner.pmi.log_conditional`
    support : "prompt" (eq. 16) or "vocabulary"
        Tokens over which p(t | v_i) is normalised: those of the prompt, or the whole vocabulary.
    vocabulary_rows : int, optional
        With support="vocabulary", estimate the sum over a large vocabulary from this many rows.
    prior : "uniform" (the paper), "center", "thirds" or "estimated"
        p(v_i) by position, see `mipruner.prior`. It is used in p(t_j) of eq. 17, p(v_j) of eq. 18 and the joint of eq.
        21.
    prior_table : rows of positive weights, optional
        For prior="estimated".
    """

    title = "MI-Pruner"
    reads = "question"
    cost = "N² d + T N"
    static = True

    lam: float = 0.5
    tau: float = 0.1
    aggregation: pmi.Aggregation = "max"
    normalization: pmi.Normalization = "softmax"
    support: Literal["prompt", "vocabulary"] = "prompt"
    vocabulary_rows: int | None = None
    prior: Prior = "uniform"
    prior_table: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self.lam, self.tau, self.vocabulary_rows)
        visual_prior(self.prior, (1, 1), self.prior_table)  # raises the error message

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        read = {"vocabulary": self.support == "vocabulary", "grid": self.prior != "uniform"}
        return frozenset(name for name, is_read in read.items() if is_read)

    def order(self, features: Features, n_keep: int) -> Tensor | None:
        return self.picks(features, n_keep)

    def picks(self, features: Features, n_keep: int, given: Tensor | None = None) -> Tensor:
        """Indices [.., n_keep] in the order of the greedy search, after the tokens ``given``."""
        if (self.aggregation, self.normalization, self.prior) == ("max", "softmax", "uniform"):
            relevance = None
            if self.support == "vocabulary":
                partition = log_partition_of(features, self.tau, self.vocabulary_rows)
                relevance = fused.relevance(features, self.tau, partition)
            tokens = features.visual, features.text
            return mi_picks(*tokens, n_keep, self.lam, self.tau, given=given, relevance=relevance, held=features.held)
        options = (self.tau, self.aggregation, self.normalization)
        redundancy = None if self.lam == 1 else pmi.redundancy(features.visual, *options, prior=self.p_visual(features))
        relevance = self.s_cross(features)
        return greedy(relevance, redundancy, n_keep, self.lam, aggregation=self.aggregation, given=given)

    def s_cross(self, features: Features) -> Tensor:
        partition = None
        if self.support == "vocabulary":
            partition = log_partition_of(features, self.tau, self.vocabulary_rows)
        return pmi.relevance(
            features.visual,
            features.text,
            self.tau,
            self.aggregation,
            self.normalization,
            log_partition=partition,
            prior=self.p_visual(features),
        )

    def p_visual(self, features: Features) -> Tensor | None:
        """p(v_i) [n_visual]; None if it is uniform."""
        if self.prior == "uniform":
            return None
        assert features.grid is not None
        return visual_prior(self.prior, features.grid, self.prior_table).to(features.visual.device)
