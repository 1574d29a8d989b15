"""Greedy search of MI-Pruner in the time of about one similarity product. Reference: `pmi`, `selection.greedy`.

With p(v_j) = 1 / n_visual, eq. 18 is PMI(v_i; v_j) = rho_ij - lse_i + log n_visual, where lse_i is the log-sum-exp of
row i of rho. So rho and one number per token are enough. rho is symmetric: half of the product gives all of it, and
after a pick j the running maximum of eq. 20 needs column j, which is read as the contiguous row j.

The picks equal those of the reference if the best two gains of every step differ by more than float32 rounding. A
product may round equal tokens differently, so a token that equals an earlier one gets the numbers of that one: the
gains are equal, and the lowest index is picked.
"""

import importlib.util
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mipruner import pmi, product
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.selection import greedy

HAS_TRITON = importlib.util.find_spec("triton") is not None

WORDS = 4096
"""Number of vocabulary rows per block."""

ENTRIES = 2**17
"""Number of entries of rho per block for scaling and log-sum-exp. A block and a copy of it fit in a core's cache."""


def mi_picks(
    visual: Tensor,
    text: Tensor,
    n_keep: int,
    lam: float,
    tau: float = 0.1,
    *,
    given: Tensor | None = None,
    relevance: Tensor | None = None,
    held: dict[Any, Any] | None = None,
) -> Tensor:
    """Picks of the greedy search of eq. 22-24 with max aggregation and softmax.

    A GPU runs the Triton kernels, a CPU the code below. The plain path runs on other devices and on a GPU for more than
    `kernels.MAX_VISUAL` tokens. No redundancy is computed for ``lam`` 1.

    Parameters
    ----------
    visual : Tensor [.., n_visual, d]
    text : Tensor [.., n_text, d]
    n_keep : int
        Number of tokens to pick in addition to ``given``.
    given : Tensor [.., n_given], optional
        Tokens that are already selected.
    relevance : Tensor [.., n_visual], optional
        S_cross to use instead of `pmi.relevance` of visual and text. The text is then not read.
    held : dict, optional
        `Features.held` of one sample.

    Returns
    -------
    Tensor [.., n_keep]
        Indices in the order of the picks; ties go to the lowest index.
    """
    n_given = 0 if given is None else given.shape[-1]
    if not 0 <= n_keep <= visual.shape[-2] - n_given:
        raise InputError(f"cannot pick {n_keep} of {visual.shape[-2] - n_given} visual tokens")
    if visual.is_cuda and HAS_TRITON:
        from mipruner import kernels

        if visual.shape[-2] <= kernels.MAX_VISUAL:
            flat = (visual.flatten(0, -3), text.flatten(0, -3)) if visual.dim() > 2 else (visual[None], text[None])
            given = None if given is None else given.reshape(-1, n_given)
            relevance = None if relevance is None else relevance.reshape(-1, visual.shape[-2])
            with torch.cuda.device_of(visual):  # Triton launches on the current device
                picks = kernels.mi_picks(*flat, n_keep, lam, tau, given=given, relevance=relevance)
            return picks.view(*visual.shape[:-2], n_keep)
    if visual.device.type != "cpu":
        redundancy = None if lam == 1 else pmi.redundancy(visual, tau)
        relevance = pmi.relevance(visual, text, tau) if relevance is None else relevance
        return greedy(relevance, redundancy, n_keep, lam, given=given)
    if visual.dim() > 2:
        options = ([None] * len(visual) if x is None else x for x in (given, relevance))
        samples = zip(visual, text, *options, strict=True)
        return torch.stack([mi_picks(v, t, n_keep, lam, tau, given=g, relevance=r) for v, t, g, r in samples])
    if lam == 1:
        if relevance is None:
            norm = once({} if held is None else held, "norm", lambda: row_norm(visual))
            relevance = _relevance(with_text(visual, text, tau, norm).log_softmax(-1))[first_equal(visual)]
        return greedy(relevance, None, n_keep, lam, given=given)
    # Stored only if it is no larger than the tokens in float32.
    held = held if held is not None and len(visual) <= visual.shape[1] else {}
    if relevance is None and len(visual) <= product.TILE and not product.is_direct(visual, text):
        visual = visual.float()  # once for both products
    first, norm, rho, lse = once(held, ("rho", tau), lambda: _among_themselves(visual, tau))
    if relevance is None:
        relevance = _relevance(with_text(visual, text, tau, norm).log_softmax(-1))
    found = _picks(rho, lse, relevance[first], n_keep, lam, [] if given is None else given.tolist())
    return torch.tensor(found, dtype=torch.long)


def once(held: dict[Any, Any], key: Hashable, compute: Callable[[], Any]) -> Any:
    """Return ``held[key]``; compute and store it if it is missing."""
    if key not in held:
        held[key] = compute()
    return held[key]


def log_partition_of(features: Features, tau: float = 0.1, n_rows: int | None = None) -> Tensor:
    """`pmi.log_partition` of an image over the vocabulary, computed once per image for all questions."""
    table = features.vocabulary
    assert table is not None
    held = {} if features.held is None else features.held
    version = 0 if table.is_inference() else table._version
    options = (features.visual, table, tau, n_rows)
    key = ("log_partition", tau, n_rows, id(table), version)
    return once(held, key, lambda: log_partition(*options, norm=features.vocabulary_norm))


def log_partition(
    visual: Tensor, vocabulary: Tensor, tau: float = 0.1, n_rows: int | None = None, *, norm: Tensor | None = None
) -> Tensor:
    """`pmi.log_partition`, faster. A Triton kernel computes it on tensor cores in 16 bit, without storing rho.

    On a CPU the norms are applied to the products, and a float32 table is not copied. ``norm`` [n_vocabulary] is the
    norm of its rows, if known.
    """
    on_gpu = visual.is_cuda and HAS_TRITON and visual.dtype == vocabulary.dtype
    if not on_gpu and (visual.device.type != "cpu" or visual.dim() > 2):
        return pmi.log_partition(visual, vocabulary, tau, n_rows)
    vocabulary, scale = pmi.drawn(vocabulary, n_rows)
    if on_gpu:
        from mipruner import kernels

        with torch.cuda.device_of(visual):
            lse = kernels.log_partition(visual.reshape(-1, visual.shape[-1]), vocabulary, tau)
        return lse.view(*visual.shape[:-1], 1) + scale
    norm = row_norm(vocabulary) if norm is None else pmi.drawn(norm, n_rows)[0]
    per_token, per_word = 1 / (tau * row_norm(visual)), (1 / norm)[:, None]
    if not product.is_direct(visual, vocabulary):
        visual = visual.float()
    rho, parts = torch.empty(min(WORDS, len(vocabulary)), len(visual)), []
    for words, scales in zip(vocabulary.split(WORDS), per_word.split(WORDS), strict=True):
        product.multiply(words, visual, rho[: len(words)])
        for rows, one in _blocks(rho[: len(words)], scales):
            parts.append(rows.mul_(one).mul_(per_token).logsumexp(0))
    return torch.stack(parts, 1).logsumexp(-1, keepdim=True)[first_equal(visual)] + scale


def row_norm(rows: Tensor) -> Tensor:
    """Norm of every row [n, d] in float32, never 0."""
    parts = [torch.linalg.vector_norm(some.float(), dim=-1) for some in rows.split(product.FEW)]
    return torch.cat(parts).clamp_min_(1e-12)


def first_equal(tokens: Tensor) -> Tensor:
    """Index of the first token [n] that equals each token of [n, d]."""
    first = torch.arange(len(tokens))
    some = tokens[:, :3].double().unbind(1)  # of one cache line
    key, order = torch.stack([w * column for w, column in zip((1, math.e, math.pi), some, strict=False)]).sum(0).sort()
    pairs = (key[1:] == key[:-1]).nonzero().flatten()
    if len(pairs):
        alike = order[torch.cat([pairs, pairs + 1]).unique()]
        distinct, kind = tokens[alike].unique(dim=0, return_inverse=True)
        first[alike] = torch.full((len(distinct),), len(tokens)).scatter_reduce(0, kind, alike, "amin")[kind]
    return first


def similarities(visual: Tensor, tau: float) -> Tensor:
    """rho of eq. 15, [n_visual, n_visual], for one sample on a CPU.

    The norms are applied to the products, so the tokens are not copied.
    """
    return _similarities(visual, tau)[2]


def _similarities(visual: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """`first_equal`, norm [n_visual] and rho [n_visual, n_visual]."""
    n_visual, first = len(visual), first_equal(visual)
    rho = torch.empty(n_visual, n_visual)
    product.of_all_pairs(visual, rho)
    if len(again := (first != torch.arange(n_visual)).nonzero().flatten()):
        rho[again] = rho[first[again]]
        rho[:, again] = rho[:, first[again]]
    norm = rho.diagonal().sqrt().clamp_min_(1e-12)
    scale = (norm * math.sqrt(tau)).reciprocal_()
    for rows, one in _blocks(rho, scale):
        rows.mul_(torch.outer(one, scale))
    return first, norm, rho


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors by blocks of rows, of about `ENTRIES` entries of the first one."""
    n_rows = max(1, ENTRIES // tensors[0].shape[1])
    return zip(*(x.split(n_rows) for x in tensors), strict=True)


def self_similarity(rows: Tensor) -> Tensor:
    """`pmi.similarity` [.., n, n] of rows [.., n, d] with themselves. For one sample on a CPU, half is computed."""
    if rows.device.type != "cpu" or rows.dim() > 2:
        return pmi.similarity(rows, rows)
    return similarities(rows, 1.0)


def _among_themselves(visual: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_similarities` and the log-sum-exp [n_visual] of the rows of rho."""
    first, norm, rho = _similarities(visual, tau)
    return first, norm, rho, torch.cat([rows.logsumexp(-1) for (rows,) in _blocks(rho)])


def with_text(visual: Tensor, text: Tensor, tau: float, norm: Tensor | None = None) -> Tensor:
    """rho of eq. 15, [n_visual, n_text], for one sample on a CPU."""
    rho = torch.empty(len(visual), len(text))
    product.multiply(visual, text, rho)
    norm = row_norm(visual) if norm is None else norm
    return rho.div_(norm[:, None]).div_(tau * row_norm(text))


def relevance(features: Features, tau: float, partition: Tensor) -> Tensor:
    """`pmi.relevance` over a vocabulary, given its `log_partition` [.., n_visual, 1]."""
    visual, text = features.visual, features.text
    if visual.device.type != "cpu" or visual.dim() > 2:
        return pmi.relevance(visual, text, tau, log_partition=partition)
    norm = once({} if features.held is None else features.held, "norm", lambda: row_norm(visual))
    return _relevance(with_text(visual, text, tau, norm) - partition)


def _relevance(log_p: Tensor) -> Tensor:
    return (log_p - log_p.logsumexp(0)).amax(-1) + math.log(len(log_p))  # eq. 17-19


def _picks(rho: Tensor, lse: Tensor, relevance: Tensor, n_keep: int, lam: float, given: list[int]) -> list[int]:
    # In numpy, whose calls on short rows take a third of torch's time.
    of_rows, relevance_of, lse_of = rho.numpy(), relevance.numpy(), lse.numpy()
    # The gain of eq. 22 is `gain - (1 - lam) running` with the running maximum over rho alone.
    score = lam * relevance_of
    gain = score + (1 - lam) * (lse_of - math.log(len(rho)))
    running, penalty = np.full_like(gain, -np.inf), np.empty_like(gain)
    picks = list(given)
    for k in range(len(given) + n_keep):
        if k >= len(given):
            picks.append(int(score.argmax()))
        np.maximum(running, of_rows[picks[k]], out=running)
        gain[picks[k]] = -np.inf
        np.multiply(running, 1 - lam, out=penalty)
        np.subtract(gain, penalty, out=score)
    return picks[len(given) :]
