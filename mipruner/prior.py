"""p(v_i) by position in the image (future work in appendix A.4 of the paper)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mipruner.errors import InputError

Prior = Literal["uniform", "center", "thirds", "estimated"]

SPREAD = {"center": 1 / 4, "thirds": 1 / 6}
"""Standard deviation of the Gaussian around the nearest centre, in image sides: e^-4 of the maximum in a corner."""

CENTERS = {"center": [(0.0, 0.0)], "thirds": [(y, x) for y in (-1 / 6, 1 / 6) for x in (-1 / 6, 1 / 6)]}
"""Centres (y, x) in image sides, relative to the middle: the middle, or the crossings of the rule of thirds."""


def visual_prior(name: Prior, grid: tuple[int, ...], table: Sequence[Sequence[float]] | None = None) -> Tensor:
    """p(v_i) [n_visual] of an image or a video; every frame has the same total.

    Parameters
    ----------
    name : "uniform", "center", "thirds" or "estimated"
    grid : (rows, columns) or (frames, rows, columns)
    table : rows of positive weights, of any size
        The estimated weights, interpolated over the image.

    Raises
    ------
    InputError
        If the name is unknown, or the table is missing or not positive.
    """
    *frames, rows, columns = grid
    if name == "uniform":
        weights = torch.ones(rows, columns)
    elif name == "estimated":
        if table is None or not (estimate := torch.tensor([[*row] for row in table])).gt(0).all():
            raise InputError("prior=estimated needs prior_table, rows of positive weights")
        weights = torch.nn.functional.interpolate(
            estimate.float()[None, None], (rows, columns), mode="bilinear", antialias=True
        )[0, 0]
    elif name in CENTERS:
        y, x = ((torch.arange(n) + 0.5) / n - 0.5 for n in (rows, columns))
        squares = torch.stack([(y - cy).square()[:, None] + (x - cx).square() for cy, cx in CENTERS[name]])
        weights = torch.exp(-squares.amin(0) / (2 * SPREAD[name] ** 2))  # of the nearest
    else:
        raise InputError(f"unknown prior {name!r}: choose uniform, center, thirds or estimated")
    weights = weights.expand(*frames, rows, columns).flatten()
    return weights / weights.sum()
