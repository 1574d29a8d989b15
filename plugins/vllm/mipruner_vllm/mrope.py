"""M-RoPE: kept tokens keep their positions on the image's grid."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mipruner_vllm.model import Pruned

BASE = 256
"""Largest integer range that is exact in bfloat16. A coordinate is stored as two digits of this base."""
SHAPE = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
"""Outputs of the processor that define a `Shape`."""


@dataclass(frozen=True)
class Shape:
    """Grid of an image or a video in tokens, and the position difference of a time step."""

    n_steps: int
    height: int
    width: int
    scale: float

    def coordinates(self) -> Tensor:
        """Time, height and width [3, n] of each token, relative to the first one."""
        t, y, x = torch.cartesian_prod(*map(torch.arange, (self.n_steps, self.height, self.width))).T
        return torch.stack([(t * self.scale).long(), y, x])


def thw_of(kwargs: dict[str, Any]) -> Tensor:
    """Time steps, height and width [n, 3] in patches, of images or videos."""
    return kwargs["image_grid_thw"] if "image_grid_thw" in kwargs else kwargs["video_grid_thw"]


class MRoPE(Pruned):
    """`Pruned` for the Qwen-VL families.

    vLLM computes positions when a request arrives, before the selection. It has a hook that computes them again after
    encoding, for its own pruning of videos. Here the hook reads the coordinates of kept tokens from six additional
    columns of the rows.
    """

    supports_multimodal_pruning = True

    def __init__(self, *, vllm_config, prefix: str = ""):
        config = vllm_config.model_config
        is_on = getattr(config.hf_config, "mipruner", None) is not None
        if is_on:  # the hook is called, no token of a video goes
            config.multimodal_config.video_pruning_rate = 1e-18
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if is_on:
            self.is_multimodal_pruning_enabled = False  # the stock rows, without the stock columns of positions

    def sizes(self, kwargs: dict[str, Any]) -> list[int]:
        return thw_of(kwargs).prod(-1).tolist()

    def shapes(self, kwargs: dict[str, Any], n: int) -> list[Shape]:
        merge, seconds = self.visual.spatial_merge_size, kwargs.get("second_per_grid_ts", [1.0] * n)
        scale = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        return [
            Shape(t, height // merge, width // merge, scale * float(second))
            for (t, height, width), second in zip(thw_of(kwargs).tolist(), seconds, strict=True)
        ]

    def grid(self, n_visual: int, shape: Shape) -> tuple[int, ...]:
        return (shape.n_steps, shape.height, shape.width)[0 if shape.n_steps > 1 else 1 :]

    def place(self, rows: Tensor, shape: Shape) -> Tensor:
        digits = [digit for axis in shape.coordinates() for digit in (axis // BASE, axis % BASE)]
        return torch.cat([rows, torch.stack(digits, 1).to(rows)], 1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[Tensor, int]:
        """Positions [3, n] of the short prompt. Text after an image has the same positions as in the full prompt.

        All rows of an image get the first position of the image; `recompute_mrope_positions` adds the coordinates.
        """
        if self.mipruner is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        position, start, parts = 0, 0, []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            offset, n_rows = feature.mm_position.offset, feature.mm_position.length
            (shape,) = self.shapes({name: field.data[None] for name, field in feature.data.items() if name in SHAPE}, 1)
            n_words = offset - start
            parts.append(torch.arange(position, position + n_words).expand(3, -1))
            parts.append(torch.full((3, n_rows), position + n_words))
            position += n_words + int(shape.coordinates().max()) + 1
            start = offset + n_rows
        parts.append(torch.arange(position, position + len(input_tokens) - start).expand(3, -1))
        return torch.cat(parts, 1), position - start

    def recompute_mrope_positions(self, input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens):
        """Add each coordinate to the position after the previous word.

        That position is not changed, because the method is called again after preemption.
        """
        if self.mipruner is None:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        ids = torch.as_tensor(input_ids)
        positions, delta = mrope_positions.clone(), int(mrope_positions.max()) + 1 - len(ids)
        if len(multimodal_embeddings):
            digits = torch.cat([rows[:, -6:] for rows in multimodal_embeddings]).T.long().to(positions.device)
            is_row = torch.isin(ids, torch.tensor([self.config.image_token_id, self.config.video_token_id]))
            begins = is_row & ~is_row.roll(1)
            first = torch.where(begins, torch.arange(len(ids)), 0).cummax(0).values
            slots = is_row.nonzero()[:, 0]
            slots = slots[slots >= num_computed_tokens][: digits.shape[1]]
            first, slots = first[slots].to(positions.device), slots.to(positions.device)
            start = torch.where(first > 0, positions[0, first - 1] + 1, 0)
            positions[:, slots] = start + (BASE * digits[::2] + digits[1::2]).to(positions.dtype)
        return [rows[:, :-6] for rows in multimodal_embeddings], positions, delta
