from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.pruners.base import Pruner
from mipruner.selection import Selection, grid_within


@dataclass(frozen=True)
class DownsamplePruner(Pruner):
    """Down-sampling: averages the grid of visual tokens to a smaller grid, without any selection.

    The new grid is the largest one with at most T tokens and about the aspect ratio of the old grid, so it may have
    fewer than T tokens. Each new token is the mean of an equal area of the old grid, and has the position of the old
    token at its centre. All frames of a video are averaged in the same way. If T is below the number of frames, frames
    are averaged too.

    VTC-Bench recommends it as a baseline for token compression.
    """

    title = "Down-sampling"
    reads = "nothing"
    reads_text = False
    cost = "N d"
    at_most: ClassVar[bool] = True

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})

    def select(self, features: Features, n_keep: int) -> Selection:
        assert features.grid is not None
        grid = features.grid if len(features.grid) == 3 else (1, *features.grid)
        if grid[0] * grid[1] * grid[2] != features.n_visual:
            raise InputError(f"the grid {features.grid} does not hold the {features.n_visual} visual tokens")
        frames = min(grid[0], n_keep)
        small = (frames, *grid_within(n_keep // frames, *grid[1:]))
        means, centres = zip(*map(shares, grid, small), strict=True)
        merge = torch.kron(torch.kron(means[0], means[1]), means[2])
        places = (centres[0][:, None, None] * grid[1] + centres[1][:, None]) * grid[2] + centres[2]
        device, batch = features.visual.device, features.visual.shape[:-2]
        return Selection(places.flatten().to(device).expand(*batch, -1), merge=merge.to(device))


def shares(n: int, k: int) -> tuple[Tensor, Tensor]:
    """Averaging matrix [k, n] from n to k cells in a row, each over n / k of the row, and their centres [k]."""
    edges = torch.arange(k + 1, dtype=torch.float64) * n / k
    cells = torch.arange(n, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    centres = ((2 * torch.arange(k) + 1) * n - 1) // (2 * k)  # the first of two cells in the middle
    return (overlap.clamp_min(0) * k / n).float(), centres
