from dataclasses import dataclass

import torch
from torch import Tensor

from mipruner.errors import InputError
from mipruner.pmi import similarity
from mipruner.pruners.base import DecoderPruner, DecoderView, Reduction
from mipruner.selection import top_k

N_PIVOTS = 4
"""Pivots among the visual tokens, and as many among the text after them."""


@dataclass(frozen=True)
class DARTPruner(DecoderPruner):
    """DART: keeps a few pivot tokens and, for each, the visual tokens that are least like it.

    Pivots are the four visual tokens and the four later text tokens with the largest L1 norm of their keys. Each in
    turn takes ``T // 8`` of the visual tokens that are left, those of smallest cosine to it, so that ``8 (T // 8) + 4``
    stay.

    Differs from the public code, which is read through a fork, where fewer than four text tokens follow the picture:
    the pivots there are then share the budget. Its code for Qwen cuts a fraction of the visual tokens off to a whole
    number, where ``keep`` is rounded here: of 576 tokens keep=0.222 leaves 132, there 124. As in that code the pivots
    take turns in the order of a Python set of their places in the prompt, which decides who picks first.

    Parameters
    ----------
    layer : int, at least 1
        The first decoder layer that sees the kept tokens only.
    exact : bool
        Keep T tokens, not ``8 (T // 8) + 4``: at most T pivots, and the first to pick take one more where T leaves a
        remainder.
    """

    title = "DART"
    paper = "https://arxiv.org/abs/2502.11494"
    reads = "decoder keys (partly the question)"
    reads_text = False
    cost = "2 of L layers at full length, 8 N d"

    layer: int = 2
    exact: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.layer < 1:
            raise InputError(f"layer={self.layer} is below 1: keys are read from the layer before")

    def stages(self, n_visual: int, n_keep: int, n_layers: int) -> dict[int, int]:
        if self.exact:
            return {self.layer: n_keep}
        return {self.layer: min(n_visual, 2 * N_PIVOTS * (n_keep // (2 * N_PIVOTS)) + N_PIVOTS)}

    def reduce(self, view: DecoderView, n_keep: int) -> Reduction:
        norms, states = view.keys.float().abs().sum((-2, -1)), view.norm(view.hidden)
        n_image = min(N_PIVOTS, view.n_visual, n_keep if self.exact else N_PIVOTS)
        image = view.visual_rows[top_k(norms[view.visual], n_image)].tolist()
        text = view.text_rows[top_k(norms[view.text_rows], N_PIVOTS)].tolist()
        pivots = list(set(image + text))
        pool = view.visual_rows[~torch.isin(view.visual_rows, torch.tensor(image, device=norms.device))]
        shares = [n_keep // len(pivots)] * len(pivots)
        if self.exact:
            each, more = divmod(n_keep - n_image, len(pivots))
            shares = [each + (k < more) for k in range(len(pivots))]
        kept = torch.tensor(image, device=norms.device)
        for pivot, share in zip(pivots, shares, strict=True):
            taken = _least_like(states[pivot], states[pool], share)
            kept = torch.cat([kept, pool[taken]])
            left = torch.ones_like(pool, dtype=torch.bool)
            left[taken] = False
            pool = pool[left]
        return Reduction(torch.isin(view.visual_rows, kept).nonzero()[:, 0])


def _least_like(pivot: Tensor, rows: Tensor, n: int) -> Tensor:
    return top_k(-similarity(rows, pivot[None])[:, 0], min(n, len(rows)))
