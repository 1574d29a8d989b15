"""Token budgets, top-k selection, and the greedy search of eq. 22-24."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mipruner.errors import InputError
from mipruner.pmi import Aggregation

LAZY_BLOCK = 32
"""Number of candidates in the first block whose gains `lazy_greedy` computes again; each next block is twice as large.
"""


@dataclass(frozen=True)
class Selection:
    """The visual tokens that are kept before the language model.

    Attributes
    ----------
    indices : Tensor [.., n_keep]
        Kept visual tokens, ascending, unique.
    embeds : Tensor [.., n_rows, d], optional
        Only for methods that merge tokens: the rows for the language model, in order. Row k has the position of
        ``indices[k]``. Further rows belong to no patch (VisionZip's CLS).
    merge : Tensor [n_keep, n_visual], optional
        For methods whose rows are all means of visual tokens: the weights of row k, which has the position of
        ``indices[k]``. They also apply to rows that the model adds in later layers.
    """

    indices: Tensor
    embeds: Tensor | None = None
    merge: Tensor | None = None

    @property
    def n_rows(self) -> int:
        """Number of visual rows for the language model."""
        return (self.indices if self.embeds is None else self.embeds[..., 0]).shape[-1]


@dataclass(frozen=True)
class Auto:
    """A budget that is computed for each sample (future work in C.5 of the paper).

    Attributes
    ----------
    quality : float in (0, 1]
        Share of all positive PMI with the text that the most relevant tokens must reach.
    keep_max : int or float
        Largest budget, see `budget`.
    """

    quality: float
    keep_max: int | float

    def __post_init__(self) -> None:
        if not 0 < self.quality <= 1:
            raise InputError(f"quality={self.quality} is not in (0, 1]")

    def enough(self, relevance: Tensor) -> int:
        """Smallest number of tokens that can reach the share ``quality`` of all positive relevance [n_visual]."""
        positive = relevance.clamp_min(0).sort(descending=True).values
        if not positive[0] > 0:  # no token has positive relevance: all are equally good
            return math.ceil(self.quality * len(relevance))
        curve = positive.cumsum(0) / positive.sum()
        return min(1 + int((curve < self.quality).sum()), len(relevance))


@dataclass(frozen=True)
class Kept:
    """Kept tokens and token counts of one prompt.

    Attributes
    ----------
    question : str
        T as text; empty without a tokenizer.
    n_visual, n_kept : list of int
        Visual tokens of each image before pruning and in the last layer.
    """

    question: str
    n_visual: list[int]
    n_kept: list[int]

    def __str__(self) -> str:
        counts = [f"{kept} of {n}" for kept, n in zip(self.n_kept, self.n_visual, strict=True)]
        images = f" in {len(counts)} images" if len(counts) > 1 else ""
        asked = f" for {self.question!r}" if self.question else ""
        return f"kept {' + '.join(counts)} image tokens{images}{asked}" if counts else "no image, nothing pruned"


def budget(keep: int | float | Auto, n_visual: int) -> int:
    """Number of tokens to keep: an integer is used as it is, a fraction in (0, 1] gives ``round(keep * n_visual)``.

    ``1`` is one token, ``1.0`` is all tokens. The result is at least 1. For an `Auto`, it is the largest possible
    budget.

    Raises
    ------
    InputError
        If keep is not positive, is a fraction above 1, or is an integer above ``n_visual``.
    """
    if isinstance(keep, Auto):
        most = keep.keep_max
        return budget(min(most, n_visual) if isinstance(most, int) else most, n_visual)
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not keep > 0:
        raise InputError(f"keep={keep!r} is not a budget: give a fraction in (0, 1], a whole number or auto")
    if isinstance(keep, float):
        if keep > 1:
            raise InputError(f"keep={keep} is neither a fraction in (0, 1] nor a whole number of tokens")
        return max(1, round(keep * n_visual))
    if keep > n_visual:
        raise InputError(
            f"keep={keep} asks for more tokens than the {n_visual} there are: lower it, or give a fraction such as 0.25"
        )
    return keep


def split_budget(n_keep: int, counts: list[int]) -> list[int]:
    """Divide ``n_keep`` among images in proportion to their ``counts``, by largest remainder, at least one token each.

    Raises
    ------
    InputError
        If there are more images than tokens to keep.
    """
    if n_keep < len(counts):
        raise InputError(f"keep leaves {n_keep} tokens for {len(counts)} images: at least one each is needed")
    total = sum(counts)
    shares = [max(1, n_keep * n // total) for n in counts]
    while sum(shares) != n_keep:
        sign = 1 if sum(shares) < n_keep else -1
        open_ = [k for k in range(len(counts)) if (shares[k] < counts[k] if sign > 0 else shares[k] > 1)]
        shares[max(open_, key=lambda k: sign * (n_keep * counts[k] / total - shares[k]))] += sign
    return shares


def grid_within(n_most: int, height: float, width: float) -> tuple[int, int]:
    """(rows, columns) of the largest grid of at most ``n_most`` cells with about the aspect ratio of height x width.

    One of its sides is that of square cells, rounded up or down. Of grids with equal size, the one with the nearest
    aspect ratio is chosen. It has at most ``height`` rows and ``width`` columns.
    """
    rows, columns = (n_most * height / width) ** 0.5, (n_most * width / height) ** 0.5
    some_rows = {min(max(1, k), n_most) for k in (math.floor(rows), math.ceil(rows))}
    some_columns = {min(max(1, k), n_most) for k in (math.floor(columns), math.ceil(columns))}
    found = {(r, n_most // r) for r in some_rows} | {(n_most // c, c) for c in some_columns}
    found = {(min(r, max(1, int(height))), min(c, max(1, int(width)))) for r, c in found}
    return max(found, key=lambda g: (g[0] * g[1], -abs(math.log(g[0] * width / g[1] / height)), -g[0]))


def top_k(scores: Tensor, n_keep: int) -> Tensor:
    """Indices [.., n_keep] of the highest scores [.., n], best first; ties go to the lowest index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :n_keep]


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [.., k, d] of ``rows`` [.., n, d] at ``index`` [.., k]."""
    if rows.dim() == 2:  # a copy of whole rows, many times faster than the gather
        return rows.index_select(0, index)
    return rows.gather(-2, index[..., None].expand(*index.shape, rows.shape[-1]))


def greedy(
    relevance: Tensor,
    redundancy: Tensor | None,
    n_keep: int,
    lam: float,
    *,
    aggregation: Aggregation = "max",
    given: Tensor | None = None,
) -> Tensor:
    """Greedy search for the largest marginal gain lam S_cross - (1 - lam) S_self, eq. 22-24.

    S_self of a candidate is the running maximum (``max``, eq. 20) or sum (``global``, eq. 21) of its redundancy terms
    over the tokens picked so far, and 0 before the first pick. Each pick costs O(n_visual).

    Parameters
    ----------
    relevance : Tensor [.., n_visual]
    redundancy : Tensor [.., n_visual, n_visual] or None
        Row i is candidate i. Not read if ``lam`` is 1; may then be None.
    n_keep : int
        Number of tokens to pick in addition to ``given``.
    given : Tensor [.., n_given], optional
        Tokens that are already selected (first round of MI-Attention).

    Returns
    -------
    Tensor [.., n_keep]
        Indices in the order of the picks; ties go to the lowest index.
    """
    n_given = 0 if given is None else given.shape[-1]
    if not 0 <= n_keep <= relevance.shape[-1] - n_given:
        raise InputError(f"cannot pick {n_keep} of {relevance.shape[-1] - n_given} visual tokens")
    lowest = torch.finfo(torch.float32).min
    gain = (lam * relevance.float()).clamp_min(lowest)
    taken = torch.zeros_like(gain, dtype=torch.bool)
    if given is not None:
        taken.scatter_(-1, given, True)
    if lam == 1:
        return top_k(gain.masked_fill(taken, -torch.inf), n_keep)

    assert redundancy is not None
    cost = (1 - lam) * redundancy.float()
    column = torch.empty_like(gain).unsqueeze(-1)
    if aggregation == "max":
        running, accumulate = torch.full_like(gain, -torch.inf), torch.maximum
    else:
        running, accumulate = torch.zeros_like(gain), torch.add

    def columns(index: Tensor) -> Tensor:
        return cost.gather(-1, index[..., None, :].expand(*column.shape[:-1], index.shape[-1]))

    if given is not None and n_given:
        chosen = columns(given)
        running = chosen.amax(-1) if aggregation == "max" else chosen.sum(-1)
    picks = torch.empty(*gain.shape[:-1], n_keep, dtype=torch.long, device=gain.device)
    for k in range(n_keep):
        score = gain - running if k or n_given else gain
        pick = score.masked_fill(taken, -torch.inf).argmax(-1, keepdim=True)
        picks[..., k] = pick[..., 0]
        taken.scatter_(-1, pick, True)
        running = accumulate(running, columns(pick)[..., 0])
    return picks


def lazy_greedy(gains: Callable[[Tensor], Tensor], add: Callable[[Tensor], None], n: int, n_keep: int) -> Tensor:
    """Greedy search for the maximum of a monotone submodular objective, for one sample on a CPU.

    Gains of such an objective only decrease while tokens are added, so an earlier gain is an upper bound of the current
    gain (Minoux 1978). Each pick computes only a few blocks of gains again.

    Parameters
    ----------
    gains : callable
        Takes candidates [k] and returns their gains [k] for the current set. The gain of a candidate must be bit-equal
        for any other candidates in the call, because ties go to the lowest index.
    add : callable
        Adds one candidate [1] to the set.
    n, n_keep : int
        Number of candidates, and number of picks.

    Returns
    -------
    Tensor [n_keep]
        Indices in the order of the picks.
    """
    bound = gains(torch.arange(n))
    fresh, taken = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    picks = torch.empty(n_keep, dtype=torch.long)
    for k in range(n_keep):
        size = LAZY_BLOCK
        while not fresh[pick := bound.argmax()]:
            block = torch.cat([pick[None], bound.topk(min(size, n), sorted=False).indices])
            size *= 2
            bound[block] = gains(block).masked_fill_(taken[block], -torch.inf)
            fresh[block] = True
        picks[k] = pick
        add(pick[None])
        bound[pick], taken[pick] = -torch.inf, True
        fresh.copy_(taken)
    return picks


def dense_greedy(gains: Callable[[], Tensor], add: Callable[[Tensor], None], n_keep: int) -> Tensor:
    """The search of `lazy_greedy` with all gains [.., n] computed at every pick.

    It supports any batch dimensions and never waits for the device.
    """
    taken, picks = None, []
    for _ in range(n_keep):
        now = gains()
        taken = torch.zeros_like(now, dtype=torch.bool) if taken is None else taken
        pick = now.masked_fill(taken, -torch.inf).argmax(-1, keepdim=True)
        add(pick)
        taken.scatter_(-1, pick, True)
        picks.append(pick)
    return torch.cat(picks, -1)
