"""M-RoPE: kept tokens keep their positions on the image's grid."""

from typing import Any

import torch
from torch import Tensor

from mipruner_vllm.model import Pruned

BASE = 256
"""bfloat16 has whole numbers up to here, so a coordinate travels as two digits of it."""


class MRoPE(Pruned):
    """`Pruned` for the Qwen-VL families.

    vLLM computes positions when a request arrives, before anything is scored, and has a hook that computes them anew
    once the rows are there. It serves vLLM's own pruning of videos; here the coordinates of kept tokens travel in four
    more columns of the rows.
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
        return kwargs["image_grid_thw"].prod(-1).tolist()

    def grid(self, n_visual: int, thw: Tensor) -> tuple[int, int]:
        _, height, width = thw.tolist()
        return height // self.visual.spatial_merge_size, width // self.visual.spatial_merge_size

    def place(self, rows: Tensor, thw: Tensor) -> Tensor:
        index = torch.arange(len(rows), device=rows.device)
        y, x = index // self.grid(len(rows), thw)[1], index % self.grid(len(rows), thw)[1]
        return torch.cat([rows, torch.stack([y // BASE, y % BASE, x // BASE, x % BASE], 1).to(rows)], 1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[Tensor, int]:
        """Positions [3, n] of the short prompt: after an image they go on as if all of it were there.

        Within an image each row has the image's first position; `recompute_mrope_positions` adds the coordinates.
        """
        if self.mipruner is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        position, start, parts = 0, 0, []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            offset, n_rows = feature.mm_position.offset, feature.mm_position.length
            n_words = offset - start
            parts.append(torch.arange(position, position + n_words).expand(3, -1))
            parts.append(torch.full((3, n_rows), position + n_words))
            position += n_words + max(self.grid(0, feature.data["image_grid_thw"].data))
            start = offset + n_rows
        parts.append(torch.arange(position, position + len(input_tokens) - start).expand(3, -1))
        return torch.cat(parts, 1), position - start

    def recompute_mrope_positions(self, input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens):
        """Heights and widths from the first row of positions, which stays: after preemption it is called again."""
        if self.mipruner is None:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        ids = torch.as_tensor(input_ids)
        positions, delta = mrope_positions.clone(), int(mrope_positions.max()) + 1 - len(ids)
        if len(multimodal_embeddings):
            digits = torch.cat([rows[:, -4:] for rows in multimodal_embeddings]).T.long().to(positions.device)
            slots = (ids == self.config.image_token_id).nonzero()[:, 0].to(positions.device)
            slots = slots[slots >= num_computed_tokens][: digits.shape[1]]
            for axis, (high, low) in ((1, digits[:2]), (2, digits[2:])):
                positions[axis, slots] = positions[0, slots] + (BASE * high + low).to(positions.dtype)
        return [rows[:, :-4] for rows in multimodal_embeddings], positions, delta
