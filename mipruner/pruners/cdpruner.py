from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.fused import self_similarity
from mipruner.pmi import similarity
from mipruner.pruners.base import Pruner
from mipruner.selection import take_rows

EPS = 1e-6


@dataclass(frozen=True)
class CDPruner(Pruner):
    """CDPruner: the most probable subset of a determinantal point process, conditioned on the question.

    Greedy search for the largest determinant of diag(q) S diag(q). S is the cosine similarity of the visual tokens, and
    q their relevance to the question, scaled to (0, 1].

    Differs from the public code if the rank of the kernel is smaller than the budget (there NaN; here the rest of the
    budget goes to the most relevant tokens), if all tokens are equally relevant (there a division by zero; here q is
    1), and for several crops (here the relevance of each image is scaled separately). A model without a CLIP text tower
    uses the relevance in the projection space, and the record says so.

    Parameters
    ----------
    relevance : "clip", "projection" or "auto"
        ``clip``: minus the cosine of CLIP's patch and text embeddings, mean over text segments. The minus sign is that
        of the public code, because the penultimate layer of CLIP ranks patches in reverse. ``projection``: the cosine
        of visual tokens and question tokens, mean over the question. ``auto``: ``clip`` if the model names its CLIP,
        else ``projection``.
    """

    title = "CDPruner"
    paper = "https://arxiv.org/abs/2506.10967"
    reads = "question, CLIP's text tower (else the projection space)"
    cost = "a text tower, N² d + T² N"

    relevance: Literal["auto", "clip", "projection"] = "auto"
    wants: ClassVar[frozenset[str]] = frozenset({"clip_visual", "clip_text", "question"})

    def order(self, features: Features, n_keep: int) -> Tensor:
        score = self.score(features)
        low, high = score.aminmax(dim=-1, keepdim=True)
        quality = torch.where(
            high > low, (score - low + EPS) / (high - low).clamp_min(torch.finfo(score.dtype).tiny), 1
        )
        return dpp_map(self_similarity(features.visual), quality, n_keep)

    def notes(self, features: Features) -> dict[str, str]:
        return {"relevance": self.source(features)}

    def source(self, features: Features) -> str:
        """Relevance that is used for these features: "clip" or "projection"."""
        has_clip = features.clip_visual is not None and features.clip_text is not None
        if self.relevance == "clip" and not has_clip:
            raise InputError("CDPruner(relevance='clip') needs a model that names its CLIP: use projection or auto")
        return "clip" if has_clip and self.relevance != "projection" else "projection"

    def score(self, features: Features) -> Tensor:
        """Relevance [.., n_visual] of every token to the question."""
        if self.source(features) == "clip":
            assert features.clip_visual is not None and features.clip_text is not None
            return -similarity(features.clip_visual, features.clip_text).mean(-1)
        cosine = similarity(features.visual, features.text)
        if features.question is None:
            return cosine.mean(-1)
        question = features.question.float()
        question = torch.where(question.any(-1, keepdim=True), question, 1.0)
        return (cosine * question[..., None, :]).sum(-1) / question.sum(-1, keepdim=True)


def dpp_map(similarity: Tensor, quality: Tensor, n_keep: int) -> Tensor:
    """Greedy MAP of the DPP with kernel q_i S_ij q_j by incremental Cholesky (https://arxiv.org/abs/1709.05135).

    similarity [.., n, n], quality [.., n]. Returns picks [.., n_keep] in order.
    """
    kernel = (quality[..., :, None] * similarity).mul_(quality[..., None, :])
    residual = kernel.diagonal(dim1=-2, dim2=-1).clone()
    floor = torch.finfo(kernel.dtype).eps * residual
    fallback = quality - quality.amax(-1, keepdim=True) - 1  # below every residual, in the order of quality
    factors = kernel.new_zeros(*quality.shape[:-1], n_keep, quality.shape[-1])
    picks = torch.empty(*quality.shape[:-1], n_keep, dtype=torch.long, device=quality.device)
    for k in range(n_keep):
        spans = residual > floor
        pick = torch.where(spans, residual, fallback).argmax(-1, keepdim=True)
        picks[..., k] = pick[..., 0]
        root = torch.where(
            spans.gather(-1, pick), residual.gather(-1, pick).sqrt(), torch.inf
        )  # otherwise it adds nothing
        done = factors[..., :k, :]
        at_pick = take_columns(done, pick)
        row = take_rows(kernel, pick)[..., 0, :] - (at_pick.mT @ done)[..., 0, :]
        factors[..., k, :] = row.div_(root)
        residual -= row.square_()
        residual.scatter_(-1, pick, -torch.inf)
        fallback.scatter_(-1, pick, -torch.inf)
    return picks


def take_columns(rows: Tensor, index: Tensor) -> Tensor:
    """Column [.., k, 1] of ``rows`` [.., k, n] at ``index`` [.., 1]."""
    if rows.dim() == 2:
        return rows.index_select(1, index)
    return rows.gather(-1, index[..., None, :].expand(*rows.shape[:-1], 1))
