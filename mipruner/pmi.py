"""Pointwise mutual information of embeddings, eq. 15-21 and 52-53 of the paper.

Every function accepts any leading batch dimensions and any float dtype, and computes in float32. All terms are
log-probabilities, so results are finite for a temperature of 0.01 and for half-precision input.

Two options are not in the paper. With ``log_partition`` [.., n_visual, 1] (see the function), p(t_j | v_i) is
normalised over the vocabulary of the language model instead of the tokens of the prompt. ``prior`` [.., n_visual] is
p(v_i), by default uniform as in the paper.
"""

import math
from functools import lru_cache, reduce
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mipruner.errors import InputError

Aggregation = Literal["max", "global"]
Normalization = Literal["softmax", "minmax", "minmax_exact"]

MINMAX_FLOOR = 1e-12
"""Smallest probability for ``normalization="minmax"``, because eq. 52 gives 0 to the smallest entry of each row."""

BLOCK = 4096
"""Number of vocabulary rows per block."""

RESOLUTION = 1e-6
"""Cosines with a smaller difference count as equal, because minmax would scale rounding errors to the whole range."""


def similarity(visual: Tensor, other: Tensor) -> Tensor:
    """Cosine similarity [.., n_visual, n_other], which is eq. 15 before the division by tau; 0 for a zero vector."""
    rows = normalize(visual.float(), dim=-1)
    return rows @ (rows if other is visual else normalize(other.float(), dim=-1)).mT


def log_partition(visual: Tensor, vocabulary: Tensor, tau: float = 0.1, n_rows: int | None = None) -> Tensor:
    """log sum_w exp(rho_iw) over a vocabulary, the denominator of eq. 16. Shape [.., n_visual, 1].

    At most `BLOCK` columns of the similarities are in memory at a time.

    Parameters
    ----------
    vocabulary : Tensor [n_vocabulary, d]
        Input-embedding table of the language model, without batch dimensions.
    n_rows : int, optional
        Estimate the sum from this many rows, always the same rows. The estimate is unbiased, and its relative error is
        proportional to 1 / sqrt(n_rows).
    """
    vocabulary, scale = drawn(vocabulary, n_rows)
    blocks = (similarity(visual, rows).div_(tau).logsumexp(-1, keepdim=True) for rows in vocabulary.split(BLOCK))
    return reduce(torch.logaddexp, blocks) + scale


def drawn(vocabulary: Tensor, n_rows: int | None) -> tuple[Tensor, float]:
    """Draw ``n_rows`` rows of the vocabulary without replacement. Also returns log(n_vocabulary / n_rows)."""
    if n_rows is None or n_rows >= len(vocabulary):
        return vocabulary, 0.0
    index = _drawn(len(vocabulary), n_rows, vocabulary.device)
    return vocabulary[index], math.log(len(vocabulary) / n_rows)


@lru_cache
def _drawn(n: int, n_rows: int, device: torch.device) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:n_rows].to(device)


def log_conditional(
    visual: Tensor,
    other: Tensor,
    tau: float = 0.1,
    normalization: Normalization = "softmax",
    log_partition: Tensor | None = None,
) -> Tensor:
    """log p(x_j | v_i) of eq. 15-16, or 52-53. Shape [.., n_visual, n_other]; rows sum to one without log_partition.

    ``softmax`` is the paper's choice. ``minmax`` scales each row to [0, 1] and divides by its sum, so tau cancels. It
    replaces zeros by `MINMAX_FLOOR`, so that the logarithm is finite; ``minmax_exact`` keeps log 0 = -inf. A row with
    equal entries is uniform for every normalization.
    """
    cosine = similarity(visual, other)
    if normalization == "softmax":
        rho = cosine / tau
        return rho.log_softmax(-1) if log_partition is None else rho - log_partition
    if normalization not in ("minmax", "minmax_exact"):
        raise InputError(f"unknown normalization {normalization!r}: choose softmax, minmax or minmax_exact")
    if log_partition is not None:
        raise InputError("over the vocabulary there is no normalization but softmax")
    low, high = cosine.aminmax(dim=-1, keepdim=True)
    flat = high - low < RESOLUTION
    scaled = torch.where(flat, 1.0, (cosine - low) / torch.where(flat, 1.0, high - low))  # eq. 52
    p = scaled / scaled.sum(-1, keepdim=True)  # eq. 53
    return (p.clamp_min(MINMAX_FLOOR) if normalization == "minmax" else p).log()


def _log_prior(log_p: Tensor, prior: Tensor | None) -> Tensor | float:
    """log p(v_i), one per row of ``log_p`` [.., n_visual, n_other]."""
    return -math.log(log_p.shape[-2]) if prior is None else prior.float().log()[..., None]


def _log_marginal(log_p: Tensor, prior: Tensor | None) -> Tensor:
    """log p(x_j) = log sum_i p(x_j | v_i) p(v_i), eq. 17 and 50. Shape [.., 1, n_other]."""
    return (log_p + _log_prior(log_p, prior)).logsumexp(-2, keepdim=True)


def _pmi(log_p: Tensor, log_marginal: Tensor | float) -> Tensor:
    """Eq. 18. Where p(x | v) = 0 the PMI is -inf, also if p(x) = 0 as well."""
    return torch.where(log_p.isneginf(), log_p, log_p - log_marginal)


def _self(visual: Tensor, tau: float, normalization: Normalization, prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """log p(v_j | v_i) and PMI(v_i; v_j), both [.., n_visual, n_visual]."""
    log_p = log_conditional(visual, visual, tau, normalization)
    log_prior = _log_prior(log_p, prior)
    return log_p, _pmi(log_p, log_prior if isinstance(log_prior, float) else log_prior.mT)


def _aggregate(log_p: Tensor, pmi: Tensor, prior: Tensor | None) -> Tensor:
    """The terms p(v_i; x_j) PMI(v_i; x_j) of eq. 21, with 0 log 0 = 0.

    The joint probability is p(x_j | v_i) p(v_i), here in units of 1 / n_visual, because the paper omits the uniform
    p(v_i).
    """
    p = log_p.exp() if prior is None else (log_p + _log_prior(log_p, prior)).exp() * log_p.shape[-2]
    return torch.where(p > 0, p * pmi, 0.0)


def cross_pmi(
    visual: Tensor,
    text: Tensor,
    tau: float = 0.1,
    normalization: Normalization = "softmax",
    *,
    log_partition: Tensor | None = None,
    prior: Tensor | None = None,
) -> Tensor:
    """PMI(v_i; t_j) of every visual and text token, eq. 15-18. Shape [.., n_visual, n_text]."""
    log_p = log_conditional(visual, text, tau, normalization, log_partition)
    return _pmi(log_p, _log_marginal(log_p, prior))


def self_pmi(
    visual: Tensor, tau: float = 0.1, normalization: Normalization = "softmax", *, prior: Tensor | None = None
) -> Tensor:
    """PMI(v_i; v_j) of every pair of visual tokens. Shape [.., n_visual, n_visual].

    Row i is the distribution of candidate i, so the matrix is not symmetric. The diagonal is included.
    """
    return _self(visual, tau, normalization, prior)[1]


def relevance(
    visual: Tensor,
    text: Tensor,
    tau: float = 0.1,
    aggregation: Aggregation = "max",
    normalization: Normalization = "softmax",
    *,
    log_partition: Tensor | None = None,
    prior: Tensor | None = None,
) -> Tensor:
    """S_cross of every visual token. Shape [.., n_visual].

    ``max`` is eq. 19, the largest PMI over the text. ``global`` is eq. 21, the KL divergence of p(T | v_i) from p(T);
    with ``log_partition``, only the terms of the prompt's tokens.
    """
    log_p = log_conditional(visual, text, tau, normalization, log_partition)
    pmi = _pmi(log_p, _log_marginal(log_p, prior))
    if aggregation == "max":
        return pmi.amax(-1)
    if aggregation == "global":
        return _aggregate(log_p, pmi, prior).sum(-1)
    raise InputError(f"unknown aggregation {aggregation!r}: choose max or global")


def redundancy(
    visual: Tensor,
    tau: float = 0.1,
    aggregation: Aggregation = "max",
    normalization: Normalization = "softmax",
    *,
    prior: Tensor | None = None,
) -> Tensor:
    """The terms that S_self of eq. 20 (max) or eq. 21 (global) aggregates over the selected set; row i is candidate i.

    Shape [.., n_visual, n_visual]: `self_pmi` for ``max``, p(v_i; v_j) PMI(v_i; v_j) for ``global``.
    """
    log_p, pmi = _self(visual, tau, normalization, prior)
    if aggregation == "max":
        return pmi
    if aggregation == "global":
        return _aggregate(log_p, pmi, prior)
    raise InputError(f"unknown aggregation {aggregation!r}: choose max or global")
