from dataclasses import dataclass

import torch
from torch import Tensor

from mipruner.pruners.base import DecoderPruner, DecoderView, Reduction
from mipruner.selection import top_k

LAYERS = (2, 6, 15)
"""The layers, of 32, after which tokens are dropped."""

PUBLISHED = {
    0: (0, 0, 0),
    64: (66, 30, 17),
    96: (238, 48, 26),
    128: (303, 110, 36),
    192: (300, 200, 110),
    576: (576,) * 3,
}
"""Kept tokens of 576 after each of these layers, by budget. 0 and 576 are the ends of the interpolation."""


@dataclass(frozen=True)
class SparseVLMPruner(DecoderPruner):
    """SparseVLM v1.5: drops visual tokens after three layers by attention from selected text tokens, and recycles some.

    Raters are the text tokens after the image whose similarity to the image is above average. The score of a visual
    token is the attention from the raters. The best 30 % of the dropped tokens are clustered and merged to one token
    per cluster.

    Differs from the public code in ties between cluster densities (there random noise; here lowest index first), in
    budgets other than 192, 128, 96 and 64 of 576 (the number of each layer is interpolated linearly between the
    published ones and scaled with the image; below T = 64 of 576, more than T tokens leave a layer on average), for
    decoders with another depth than 32 (layers are scaled), and with M-RoPE (positions are kept; a cluster has the
    position of its centre).
    """

    title = "SparseVLM"
    paper = "https://arxiv.org/abs/2410.04417"
    reads = "decoder attention, question"
    cost = "L / 11 layers at full length, attention of its words thrice"

    renumbers = True

    def stages(self, n_visual: int, n_keep: int, n_layers: int) -> dict[int, int]:
        entering, stages = n_visual, {}
        for layer, keep in self.schedule(n_visual, n_keep, n_layers).items():
            keep = min(keep, entering - 1)
            entering = keep + n_recycled(entering - keep)[1]
            stages[layer] = entering
        return stages

    @staticmethod
    def schedule(n_visual: int, n_keep: int, n_layers: int) -> dict[int, int]:
        """{layer: visual tokens kept before it, without recycled ones}; if layers coincide, the last entry counts."""
        budget = 576 * n_keep / n_visual
        low = max(b for b in PUBLISHED if b <= budget)
        high = min(b for b in PUBLISHED if b >= budget)
        share = (budget - low) / (high - low) if high > low else 0
        counts = [a + share * (b - a) for a, b in zip(PUBLISHED[low], PUBLISHED[high], strict=True)]
        layers = [min(round(layer * n_layers / 32) + 1, n_layers - 1) for layer in LAYERS]
        return {layer: max(1, round(n * n_visual / 576)) for layer, n in zip(layers, counts, strict=True)}

    def reduce(self, view: DecoderView, n_keep: int) -> Reduction:
        schedule = self.schedule(view.n_start, n_keep, view.n_layers)
        keep = schedule[max(layer for layer in schedule if layer <= view.layer)]
        words = len(view.visual) - raters(view)
        score = view.attention(words).mean(0)[:, view.visual].mean(0)
        return recycle(view.hidden[view.visual], score, min(keep, view.n_visual - 1))


def raters(view: DecoderView) -> Tensor:
    """Text tokens that rate, counted from the end of the prompt (1 is the last token), where no text is dropped."""
    visual = view.prompt[view.prompt_visual].float()
    text = view.prompt[int(view.prompt_visual.nonzero()[-1]) + 1 :].float()
    relevance = (visual @ text.mT).softmax(-1).mean(0)
    rates = relevance > relevance.mean()
    return len(text) - (rates if rates.any() else torch.ones_like(rates)).nonzero()[:, 0]


def n_recycled(n_dropped: int) -> tuple[int, int]:
    """Number of recycled tokens of ``n_dropped``, and number of their clusters."""
    recycled = int(0.3 * n_dropped) + 1
    return recycled, int(recycled / 10) + 1


def recycle(hidden: Tensor, score: Tensor, n_keep: int) -> Reduction:
    """Keep the ``n_keep`` highest scores [n] and merge the best of the others, clustered by hidden states [n, d]."""
    order = top_k(score, len(score))
    n_best, n_clusters = n_recycled(len(score) - n_keep)
    best = order[n_keep : n_keep + n_best]
    centres, cluster = density_peaks(hidden[best].float(), n_clusters)
    merge = torch.zeros(n_clusters, len(score), device=score.device)
    merge[cluster, best] = 1
    merge = merge / (merge.sum(1, keepdim=True) + 1e-6)
    return Reduction(order[:n_keep].sort().values, merge, best[centres])


def density_peaks(rows: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Density-peak clustering of rows [n, d]: centres [n_clusters] and the cluster [n] of each row.

    A centre has a high density and a large distance to any row of higher density
    (https://doi.org/10.1126/science.1242072). Of two rows with equal density, the first counts as denser: with two
    clusters, mutual nearest neighbours always have equal density.
    """
    exact = "donot_use_mm_for_euclid_dist"  # bit-symmetric, and 0 on the diagonal
    distance = torch.cdist(rows, rows, compute_mode=exact) / rows.shape[-1] ** 0.5
    density = (-distance.topk(n_clusters, largest=False).values.square().mean(-1)).exp()
    rank = torch.empty_like(density, dtype=torch.long)
    rank[top_k(density, len(density))] = torch.arange(len(density), device=density.device)
    denser = rank[None, :] < rank[:, None]
    delta = torch.where(denser, distance, distance.max()).amin(-1)
    centres = top_k(delta * density, n_clusters)
    cluster = distance[centres].argmin(0)
    cluster[centres] = torch.arange(n_clusters, device=cluster.device)
    return centres, cluster
