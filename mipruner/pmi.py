"""Pointwise mutual information of embeddings, eq. 15-21 and 52-53 of the paper.

Every function takes any leading batch dimensions and any float dtype and computes in float32. Everything is written
with log-probabilities, so that a temperature of 0.01 or a half-precision input stays finite.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mipruner.errors import InputError

Aggregation = Literal["max", "global"]
Normalization = Literal["softmax", "minmax", "minmax_exact"]

MINMAX_FLOOR = 1e-12
"""Smallest probability under ``normalization="minmax"``: eq. 52 gives each row's least similar entry exactly 0."""

RESOLUTION = 1e-6
"""Cosines closer than this are equal: minmax would blow rounding up to the whole range."""


def similarity(visual: Tensor, other: Tensor) -> Tensor:
    """Cosine similarity [.., n_visual, n_other]: eq. 15 before the division by tau. A zero vector gives 0."""
    visual, other = normalize(visual.float(), dim=-1), normalize(other.float(), dim=-1)
    return visual @ other.mT


def log_conditional(
    visual: Tensor, other: Tensor, tau: float = 0.1, normalization: Normalization = "softmax"
) -> Tensor:
    """log p(x_j | v_i) of eq. 15-16, or 52-53. Shape [.., n_visual, n_other], rows sum to one.

    ``softmax`` is the paper's choice. ``minmax`` scales each row to [0, 1] and divides by its sum, where tau cancels;
    its zeros are lifted to `MINMAX_FLOOR` so that the logarithm stays finite, and ``minmax_exact`` leaves them at
    log 0 = -inf. A row whose entries are all equal is uniform under every normalization.
    """
    cosine = similarity(visual, other)
    if normalization == "softmax":
        return (cosine / tau).log_softmax(-1)
    if normalization not in ("minmax", "minmax_exact"):
        raise InputError(f"unknown normalization {normalization!r}: choose softmax, minmax or minmax_exact")
    low, high = cosine.aminmax(dim=-1, keepdim=True)
    flat = high - low < RESOLUTION
    scaled = torch.where(flat, 1.0, (cosine - low) / torch.where(flat, 1.0, high - low))  # eq. 52
    p = scaled / scaled.sum(-1, keepdim=True)  # eq. 53
    return (p.clamp_min(MINMAX_FLOOR) if normalization == "minmax" else p).log()


def _log_marginal(log_p: Tensor) -> Tensor:
    """log p(x_j) = log of the mean over the visual tokens of p(x_j | v_i), eq. 17. Shape [.., 1, n_other]."""
    return log_p.logsumexp(-2, keepdim=True) - math.log(log_p.shape[-2])


def _pmi(log_p: Tensor, log_marginal: Tensor | float) -> Tensor:
    """Eq. 18. Where p(x | v) = 0 the PMI is -inf, also if p(x) = 0 as well."""
    return torch.where(log_p.isneginf(), log_p, log_p - log_marginal)


def _aggregate(log_p: Tensor, pmi: Tensor) -> Tensor:
    """Terms p(x_j | v_i) PMI(v_i; x_j) of eq. 21, with 0 log 0 = 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * pmi, 0.0)


def cross_pmi(visual: Tensor, text: Tensor, tau: float = 0.1, normalization: Normalization = "softmax") -> Tensor:
    """PMI(v_i; t_j) of every visual and text token, eq. 15-18. Shape [.., n_visual, n_text]."""
    log_p = log_conditional(visual, text, tau, normalization)
    return _pmi(log_p, _log_marginal(log_p))


def self_pmi(visual: Tensor, tau: float = 0.1, normalization: Normalization = "softmax") -> Tensor:
    """PMI(v_i; v_j) of every two visual tokens under p(v_j) = 1 / n_visual. Shape [.., n_visual, n_visual].

    Row i is candidate i's own distribution, so the matrix is not symmetric; the diagonal is included.
    """
    log_p = log_conditional(visual, visual, tau, normalization)
    return _pmi(log_p, -math.log(log_p.shape[-1]))


def relevance(
    visual: Tensor,
    text: Tensor,
    tau: float = 0.1,
    aggregation: Aggregation = "max",
    normalization: Normalization = "softmax",
) -> Tensor:
    """S_cross of every visual token. Shape [.., n_visual].

    ``max`` is eq. 19, the strongest PMI over the text; ``global`` is eq. 21, the KL divergence of p(T | v_i) from p(T).
    """
    log_p = log_conditional(visual, text, tau, normalization)
    pmi = _pmi(log_p, _log_marginal(log_p))
    if aggregation == "max":
        return pmi.amax(-1)
    if aggregation == "global":
        return _aggregate(log_p, pmi).sum(-1)
    raise InputError(f"unknown aggregation {aggregation!r}: choose max or global")


def redundancy(
    visual: Tensor,
    tau: float = 0.1,
    aggregation: Aggregation = "max",
    normalization: Normalization = "softmax",
) -> Tensor:
    """The terms that S_self of eq. 20 (max) or eq. 21 (global) reduces over the selected set, row i = candidate i.

    Shape [.., n_visual, n_visual]: `self_pmi` for ``max``, p(v_j | v_i) PMI(v_i; v_j) for ``global``.
    """
    log_p = log_conditional(visual, visual, tau, normalization)
    pmi = _pmi(log_p, -math.log(log_p.shape[-1]))
    if aggregation == "max":
        return pmi
    if aggregation == "global":
        return _aggregate(log_p, pmi)
    raise InputError(f"unknown aggregation {aggregation!r}: choose max or global")
