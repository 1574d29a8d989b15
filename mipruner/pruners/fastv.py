from dataclasses import dataclass

import torch

from mipruner.errors import InputError
from mipruner.pruners.base import DecoderPruner, DecoderView, Reduction
from mipruner.selection import top_k


@dataclass(frozen=True)
class FastVPruner(DecoderPruner):
    """FastV: keeps the visual tokens with the highest attention from the last token in an early decoder layer.

    The attention is the mean over heads in the layer before ``layer``. Kept tokens keep their positions.

    Differs from the paper, and follows the public code, in reading the last token's attention instead of the mean over
    all tokens. Differs from the public code in using the KV cache, pruning once in the prefill.

    Parameters
    ----------
    layer : int, at least 1
        First decoder layer with kept tokens only (K of the paper).
    """

    title = "FastV"
    paper = "https://arxiv.org/abs/2403.06764"
    reads = "decoder attention (implicitly the question)"
    reads_text = False
    cost = "2 of L layers at full length, one row of attention"

    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise InputError(f"layer={self.layer} is below 1: attention is read from the layer before")

    def stages(self, n_visual: int, n_keep: int, n_layers: int) -> dict[int, int]:
        return {self.layer: n_keep}

    def reduce(self, view: DecoderView, n_keep: int) -> Reduction:
        last = torch.tensor([len(view.visual) - 1], device=view.visual.device)
        score = view.attention(last).mean(0)[0, view.visual]
        return Reduction(top_k(score, n_keep).sort().values)
