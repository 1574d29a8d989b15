from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mipruner.errors import InputError
from mipruner.pmi import similarity
from mipruner.pruners.base import DecoderPruner, DecoderView, Reduction
from mipruner.selection import Auto, top_k

N_PIVOTS = 4
"""Number of pivots among the visual tokens, and among the text tokens after them."""


@dataclass(frozen=True)
class DARTPruner(DecoderPruner):
    """DART: keeps a few pivot tokens and, for each, the visual tokens that are least similar to it.

    Pivots are the four visual tokens and the four later text tokens whose keys have the largest L1 norm. Each pivot in
    turn keeps the ``T // 8`` remaining visual tokens with the smallest cosine to it. So ``8 (T // 8) + 4`` tokens are
    kept.

    Differs from the public code (read from a fork) if fewer than four text tokens follow the image: then the existing
    pivots share the budget. As in that code, the order of the pivots is that of a Python set of their positions in the
    prompt.

    Parameters
    ----------
    layer : int, at least 1
        First decoder layer with kept tokens only.
    exact : bool
        Keep T tokens instead of ``8 (T // 8) + 4``: at most T pivots, and the first ones keep one more token if there
        is a remainder.
    rounding : "nearest" or "down"
        Rounding of a fraction ``keep``. ``down`` is ``int(N (1 - reduction))``, as in the public code for Qwen: with
        576 tokens and keep=0.222 it keeps 124 tokens, ``nearest`` keeps 132.
    """

    title = "DART"
    paper = "https://arxiv.org/abs/2502.11494"
    reads = "decoder keys (partly the question)"
    reads_text = False
    cost = "2 of L layers at full length, 8 N d"

    layer: int = 2
    exact: bool = False
    rounding: Literal["nearest", "down"] = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise InputError(f"layer={self.layer} is below 1: keys are read from the layer before")

    def budget(self, keep: int | float | Auto, n_visual: int) -> int:
        n_keep = super().budget(keep, n_visual)
        if self.rounding == "nearest" or not isinstance(keep, float):
            return n_keep
        return max(
            1, int(n_visual * (1 - (1 - keep)))
        )  # the option of the public code is reduction = 1 - keep, a float

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
