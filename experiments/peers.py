"""Reference implementations of other methods' selection rules: plain torch, one sample, without mipruner.

Each computes what the released code computes, in the same order and with the same complexity. `task=peers` compares
their time with the selection of this repository. Tests compare their results with `mipruner.pruners`.
"""

import torch
from torch import Tensor


def unit(rows: Tensor) -> Tensor:
    """Rows [n, d] divided by their norms, in float32."""
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def divprune(visual: Tensor, n_keep: int) -> Tensor:
    """Max-min diversity (arXiv 2503.02175), with the loop of vbdi/divprune. Picks [n_keep] in order."""
    rows = unit(visual)
    distance = 1 - rows @ rows.T
    taken = torch.zeros(len(rows), dtype=torch.bool)
    picks: list[int] = []
    for _ in range(n_keep):
        if picks:
            score = distance.index_select(0, torch.tensor(picks)).amin(0)
        else:
            score = distance.topk(2, dim=0, largest=False).values[1]
        picks.append(int(score.masked_fill(taken, -torch.inf).argmax()))
        taken[picks[-1]] = True
    return torch.tensor(picks)


def cdpruner(visual: Tensor, relevance: Tensor, n_keep: int) -> Tensor:
    """Greedy MAP of the conditional DPP (arXiv 2506.10967) by incremental Cholesky, as in Theia-4869/CDPruner."""
    rows = unit(visual)
    q = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = q[:, None] * (rows @ rows.T) * q
    residual, factors = kernel.diagonal().clone(), torch.zeros(n_keep, len(rows))
    picks = torch.empty(n_keep, dtype=torch.long)
    for k in range(n_keep):
        j = residual.argmax()
        picks[k] = j
        projected = torch.einsum("t,tn->n", factors[:k, j], factors[:k])
        factors[k] = (kernel[j] - projected) / residual[j].sqrt()
        residual -= factors[k].square()
        residual[j] = -torch.inf
    return picks


def mmtok(visual: Tensor, text: Tensor, hidden: Tensor, n_keep: int) -> Tensor:
    """Greedy maximum coverage (arXiv 2508.18264) with all gains at every pick, as in Ironieser/MMTok."""
    of_text = (unit(text) @ unit(visual).T / 0.02).softmax(-1) / len(text)
    of_image = (unit(hidden) @ unit(hidden).T / 0.2).softmax(-1) / len(hidden)
    cover = torch.cat([of_text, 0.5 * of_image])
    best, taken = torch.zeros(len(cover), 1), torch.zeros(len(visual), dtype=torch.bool)
    picks = torch.empty(n_keep, dtype=torch.long)
    for k in range(n_keep):
        gain = (cover - best).clamp_min_(0).sum(0)
        picks[k] = gain.masked_fill(taken, -torch.inf).argmax()
        taken[picks[k]] = True
        best = torch.maximum(best, cover[:, picks[k], None])
    return picks


def vispruner(attention: Tensor, hidden: Tensor, n_keep: int, important: float = 0.5) -> Tensor:
    """Attention, then rounds that remove eight duplicates (arXiv 2412.01818), as in Theia-4869/VisPruner."""
    rows, order = unit(hidden), attention.argsort(descending=True, stable=True)
    n_important = int(n_keep * important)
    rest, wanted = order[n_important:], n_keep - n_important
    while 0 < wanted < len(rest):
        a, b = rest[0::2], rest[1::2]
        likeness = (rows[a] @ rows[b].T).amax(1)
        by_likeness = a[likeness.argsort(descending=True, stable=True)]
        rest = torch.cat([by_likeness[min(8, len(rest) - wanted) :], b])
    return torch.cat([order[:n_important], rest[:wanted]])
