"""Attention inside a vision encoder, recomputed from queries and keys of one layer, so any implementation works."""

import torch
from torch import Tensor

BLOCK = 2**24
"""Number of attention weights in memory at a time."""


def cls_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention [.., n_visual] that the CLS (token 0) pays to each patch, mean over heads.

    q, k [.., 1 + n_visual, heads, d_head].
    """
    q, k = (x.float().transpose(-3, -2) for x in (q, k))
    weights = (q[..., :1, :] @ k.mT * scale).softmax(-1)
    return weights[..., 0, 1:].mean(-2)


def received_attention(q: Tensor, k: Tensor, scale: float, is_real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention that each token receives from all other tokens (eq. 5) and from itself, both [.., n], mean over heads.

    q, k [.., n, heads, d_head]. ``is_real`` [n] is False for padding, which neither pays nor receives any.
    """
    q, k = (x.float().transpose(-3, -2) for x in (q, k))
    received, parts = torch.zeros_like(k[..., 0]), []
    step = max(1, BLOCK // k[..., 0].numel())
    for start in range(0, q.shape[-2], step):
        logits = q[..., start : start + step, :] @ k.mT * scale
        if is_real is None:
            weights = logits.softmax(-1)
        else:
            weights = logits.masked_fill(~is_real, -torch.inf).softmax(-1) * is_real[start : start + step, None]
        received += weights.sum(-2)
        parts.append(weights.diagonal(start, -2, -1))
    own = torch.cat(parts, -1)
    return (received - own).mean(-2), own.mean(-2)
