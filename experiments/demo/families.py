"""Training code of the demo's two architectures: pixels to visual tokens, and visual tokens to answers."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass
class Visual:
    """Visual tokens [B, n_visual, d] of a batch of images of one size.

    ``grid`` is (rows, columns). ``deepstack`` has a tensor of the same shape for each of the first decoder layers.
    ``cls`` [B, width] is the CLS token of the vision encoder, if there is one.
    """

    tokens: Tensor
    grid: tuple[int, int]
    deepstack: list[Tensor] = field(default_factory=list)
    cls: Tensor | None = None


class Llava:
    """CLIP, projector, Llama. A sequence is the patches, then the turns."""

    cell: ClassVar[int] = 14

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @property
    def vision_modules(self) -> list[nn.Module]:
        return [self.model.model.vision_tower, self.model.model.multi_modal_projector]

    def see(self, pixels: Tensor) -> Visual:
        """Encode normalised pixels [B, 3, height, width] to visual tokens."""
        out = self.model.model.vision_tower(pixels, output_hidden_states=True)
        patches = out.hidden_states[self.model.config.vision_feature_layer][:, 1:]
        grid = (pixels.shape[2] // self.cell, pixels.shape[3] // self.cell)
        return Visual(self.model.model.multi_modal_projector(patches), grid, cls=out.pooler_output)

    def read(self, visual: Visual, kept: Tensor, ids: Tensor) -> Tensor:
        """Logits [B, n_ids, vocabulary] for ``ids`` after the visual tokens ``kept`` [B, n_kept].

        Positions are renumbered, as in LLaVA-1.5 after pruning.
        """
        shown = take(visual.tokens, kept)
        words = self.model.get_input_embeddings()(ids)
        inputs = torch.cat([shown.to(words.dtype), words], 1)
        hidden = self.model.model.language_model(inputs_embeds=inputs, use_cache=False)
        return self.model.lm_head(hidden.last_hidden_state[:, kept.shape[1] :])


class Qwen3VL:
    """ViT, merger, deepstack, decoder with M-RoPE. A sequence is start token, visual tokens, end token, turns."""

    cell: ClassVar[int] = 28

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @property
    def vision_modules(self) -> list[nn.Module]:
        return [self.model.model.visual]

    def see(self, pixels: Tensor) -> Visual:
        config = self.model.config.vision_config
        patches, grid = patchify(pixels, config.patch_size, config.spatial_merge_size, config.temporal_patch_size)
        out = self.model.model.get_image_features(patches, grid)
        n = len(pixels)

        def stack(rows: Tensor | list | tuple) -> Tensor:  # one tensor of all images, or one of each
            return (rows if isinstance(rows, Tensor) else torch.cat(list(rows))).unflatten(0, (n, -1))

        cells = (pixels.shape[2] // self.cell, pixels.shape[3] // self.cell)
        return Visual(stack(out.pooler_output), cells, [stack(rows) for rows in out.deepstack_features])

    def read(self, visual: Visual, kept: Tensor, ids: Tensor) -> Tensor:
        """Like `Llava.read`, but each visual token keeps its position in time, height and width."""
        config, embed = self.model.config, self.model.get_input_embeddings()
        n, n_kept = kept.shape
        (rows, columns), device = visual.grid, kept.device
        start, end = (
            embed(torch.full((n, 1), token, device=device))
            for token in (config.vision_start_token_id, config.vision_end_token_id)
        )
        shown = take(visual.tokens, kept).to(start.dtype)
        inputs = torch.cat([start, shown, end, embed(ids)], 1)
        places = 1 + torch.stack([torch.zeros_like(kept), kept // columns, kept % columns])
        after = 1 + max(rows, columns) + torch.arange(1 + ids.shape[1], device=device).expand(3, n, -1)
        positions = torch.cat([torch.zeros_like(after[..., :1]), places, after], -1)
        is_visual = torch.zeros(inputs.shape[:2], dtype=torch.bool, device=device)
        is_visual[:, 1 : 1 + n_kept] = True
        hidden = self.model.model.language_model(
            inputs_embeds=inputs,
            use_cache=False,
            position_ids=positions,
            visual_pos_masks=is_visual,
            deepstack_visual_embeds=[take(rows, kept).flatten(0, 1).to(inputs.dtype) for rows in visual.deepstack],
        )
        return self.model.lm_head(hidden.last_hidden_state[:, n_kept + 2 :])


FAMILIES: dict[str, type[Llava | Qwen3VL]] = {"llava": Llava, "qwen3_vl": Qwen3VL}


def take(rows: Tensor, indices: Tensor) -> Tensor:
    """Take rows [B, n, d] at indices [B, k]. Shape [B, k, d]."""
    return rows.gather(1, indices[..., None].expand(-1, -1, rows.shape[-1]))


def patchify(pixels: Tensor, patch: int, merge: int, frames: int) -> tuple[Tensor, Tensor]:
    """Rearrange pixels [B, 3, height, width] like Qwen's image processor.

    Returns patches [B * rows * columns, 3 * frames * patch * patch], and the grid (1, rows, columns) of each image [B,
    3]. Patches of one token are neighbours. The image is repeated for each frame.
    """
    n, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    cut = pixels.reshape(n, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, frames, -1, -1)
    grid = torch.tensor([[1, rows, columns]] * n, device=pixels.device)
    return cut.reshape(n * rows * columns, -1), grid
