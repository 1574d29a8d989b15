from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.pruners.base import Pruner
from mipruner.selection import Selection, take_rows, top_k


@dataclass(frozen=True)
class VisionZipPruner(Pruner):
    """VisionZip: dominant tokens by encoder attention, and contextual tokens into which the others are merged.

    Every k-th of the other tokens becomes a contextual token: itself plus the mean of the tokens whose keys are most
    similar to its key.

    With a CLS token (CLIP), tokens are merged before the projector, CLS is kept and counted, and the order is CLS,
    dominant, contextual. Without CLS (Qwen-VL), projected tokens are merged in place, as in the public code for
    Qwen2.5-VL.

    Differs from the public code in the split for budgets without a published setting: with CLS, 10 of 64 are
    contextual, as in its settings for 64, 128 and 192. Without CLS, as there, 5 % of all tokens are contextual, but
    never more than half of the budget.

    Parameters
    ----------
    contextual : float in [0, 1], optional
        Share of the budget for contextual tokens; by default the split of the public code.
    """

    title = "VisionZip"
    paper = "https://arxiv.org/abs/2412.04467"
    reads = "encoder attention, keys, features before the projector"
    reads_text = False
    cost = "one row of encoder attention, N T d"

    contextual: float | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})
    wants: ClassVar[frozenset[str]] = frozenset({"attention_to_self", "hidden", "cls_hidden", "project"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contextual is not None and not 0 <= self.contextual <= 1:
            raise InputError(f"contextual={self.contextual} is not in [0, 1]")

    def select(self, features: Features, n_keep: int) -> Selection:
        assert features.attention is not None and features.keys is not None
        received = features.attention
        if features.attention_to_self is not None:
            received = received + features.attention_to_self
        if features.cls_hidden is None:
            n_contextual = self.n_contextual(n_keep, min(max(int(0.05 * features.n_visual), 1), n_keep // 2))
            dominant, targets, weights = _zip(received, features.keys, n_keep - n_contextual, n_contextual)
            indices, order = torch.cat([dominant, targets], -1).sort(-1)
            rows = torch.cat([take_rows(features.visual, dominant), _merge(features.visual, targets, weights)], -2)
            return Selection(indices, take_rows(rows, order))
        if features.hidden is None or features.project is None:
            raise InputError("VisionZip needs hidden and project where the encoder has a CLS")
        cls = features.cls_hidden[..., :n_keep, :]
        n_contextual = min(self.n_contextual(n_keep, round(n_keep * 10 / 64)), n_keep - cls.shape[-2])
        n_dominant = n_keep - cls.shape[-2] - n_contextual
        dominant, targets, weights = _zip(received, features.keys, n_dominant, n_contextual)
        hidden = features.hidden
        rows = torch.cat([cls, take_rows(hidden, dominant), _merge(hidden, targets, weights)], -2)
        return Selection(torch.cat([dominant, targets], -1).sort(-1).values, features.project(rows))

    def n_contextual(self, n_keep: int, official: int) -> int:
        return official if self.contextual is None else round(self.contextual * n_keep)


def _zip(received: Tensor, keys: Tensor, n_dominant: int, n_contextual: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dominant tokens [.., n_dominant], contextual targets [.., n_contextual], and the tokens merged into each target.

    The last result is [.., n_contextual, n_visual]; row c is the mean over the tokens assigned to target c.
    """
    taken = torch.zeros_like(received, dtype=torch.bool).scatter(-1, top_k(received, n_dominant), True)
    order = taken.sort(dim=-1, descending=True, stable=True).indices
    dominant, rest = order[..., :n_dominant], order[..., n_dominant:]
    every = max(1, rest.shape[-1] // max(1, n_contextual))
    is_target = torch.arange(rest.shape[-1], device=rest.device) % every == 0
    is_target &= is_target.cumsum(0) <= n_contextual
    targets, others = rest[..., is_target], rest[..., ~is_target]
    weights = torch.zeros(*targets.shape, received.shape[-1], device=received.device)
    if n_contextual and others.shape[-1]:
        rows = normalize(keys.float(), dim=-1)
        nearest = (take_rows(rows, others) @ take_rows(rows, targets).mT).argmax(-1)
        assigned = torch.nn.functional.one_hot(nearest, n_contextual).to(weights).mT
        weights.scatter_(-1, others[..., None, :].expand_as(assigned), assigned)
    return dominant, targets, weights / weights.sum(-1, keepdim=True).clamp_min(1)


def _merge(rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Row of each target plus the mean of its assigned tokens (a sum, not an average)."""
    return (take_rows(rows, targets).float() + weights @ rows.float()).to(rows)
