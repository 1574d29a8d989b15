import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mipruner.pruners.base import DecoderPruner, DecoderView, Reduction
from mipruner.pruners.sparsevlm import n_recycled, recycle

EPS = 1e-6
"""Added to p(x) p(y); also the lower limit of the ratio in the logarithm."""


@dataclass(frozen=True)
class AutoPruner(DecoderPruner):
    """AutoPrune: fits a pruning curve over the decoder layers, from the mutual information of text and image.

    After the first layer, 2.5 T tokens are kept by encoder attention plus weighted attention from the text. The mutual
    information between text rows and visual columns of the second layer's attention gives the slope of a logistic
    curve. The curve is scaled so that T tokens leave a layer on average. Every later layer keeps its number of tokens
    by attention from the text, and recycles like SparseVLM.

    Differs from the public code for decoders with another depth than 32 (the curve is stretched), for encoders without
    CLS (the attention received from all patches replaces the CLS row), and with M-RoPE (positions are kept).

    Parameters
    ----------
    centre, slope, sensitivity : float
        x0, k0 and gamma of the curve 0.75 / (1 + exp(k (layer - x0 - k))) with k = max(k0 - gamma MI, 0).
    text_weight : float
        Weight of the attention from the text in the first layer.
    """

    title = "AutoPrune"
    paper = "https://arxiv.org/abs/2509.23931"
    reads = "decoder and encoder attention, question"
    cost = "a layer at full length, attention of all text in each"

    centre: float = 14.9
    slope: float = 0.4
    sensitivity: float = 0.2
    text_weight: float = 0.3

    renumbers = True
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def stages(self, n_visual: int, n_keep: int, n_layers: int) -> dict[int, int]:
        """The curve for zero mutual information, because the prompt is not known here."""
        leaving = _leaving(self.curve(0.0, n_visual, n_keep, n_layers), n_visual)
        return {layer + 1: leaving[layer] for layer in range(n_layers - 1)}

    def nominal(self, n_visual: int, n_keep: int, n_layers: int) -> int:
        return n_keep  # is already a mean over layers

    def curve(self, information: float, n_visual: int, n_keep: int, n_layers: int) -> list[int]:
        """Number of visual tokens that each layer keeps.

        With recycled tokens, about n_layers * n_keep tokens leave the layers in total.
        """
        first = min(int(2.5 * n_keep), n_visual)
        (n_first,) = _leaving([first], n_visual)
        k = max(self.slope - self.sensitivity * information, 0.0)
        shape = [0.75 / (1 + math.exp(k * (layer * 32 / n_layers - self.centre - k))) for layer in range(1, n_layers)]

        def scaled(scale: float) -> list[int]:
            return [first, *(max(1, math.ceil((n_first - 1) * min(scale * y, 1.0))) for y in shape)]

        low, high = 0.0, 1 / shape[-1]
        for _ in range(60):
            scale = (low + high) / 2
            enough = sum(_leaving(scaled(scale), n_visual)) >= n_layers * n_keep
            low, high = (low, scale) if enough else (scale, high)
        return scaled(high)

    def reduce(self, view: DecoderView, n_keep: int) -> Reduction | None:
        attention = view.attention(view.text_rows)[..., view.visual]
        score = attention.mean((0, 1))
        if not view.memory:
            assert view.encoder_attention is not None
            view.memory["curve"] = None
            weight = self.text_weight * mutual_information(attention) / attention.shape[1]
            score = view.encoder_attention.to(score) + weight * score
            keep = min(int(2.5 * n_keep), view.n_start)
        else:
            if view.memory["curve"] is None:
                information = float(mutual_information(attention))
                view.memory["curve"] = self.curve(information, view.n_start, n_keep, view.n_layers)
            keep = view.memory["curve"][view.layer - 1]
        if keep >= view.n_visual:
            return None
        return recycle(view.hidden[view.visual], score, keep)


def mutual_information(attention: Tensor) -> Tensor:
    """Mutual information in bits between text rows and visual columns of [n_heads, n_text, n_visual], summed over
    heads.

    p(x) is uniform over the rows. p(y | x) is a row without scaling, so its sum over the visual tokens is below 1. As
    in the public code, `EPS` is added to p(x) p(y), which lowers the result for many visual tokens.
    """
    joint = attention.float() / attention.shape[1]
    independent = joint.sum(1, keepdim=True) / attention.shape[1]
    return (joint * (joint / (independent + EPS)).clamp_min(EPS).log2()).sum()


def _leaving(keeps: list[int], n_visual: int) -> list[int]:
    """Number of visual tokens that leave each layer, recycled ones included, if the layers keep ``keeps``."""
    leaving = []
    for keep in keeps:
        if keep < n_visual:
            n_visual = keep + n_recycled(n_visual - keep)[1]
        leaving.append(n_visual)
    return leaving
