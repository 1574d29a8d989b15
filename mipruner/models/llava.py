"""LLaVA-1.5: CLIP patches of one layer, an MLP, a Llama with plain positions."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from mipruner.models.base import Adapter, Visual, captured


class LlavaAdapter(Adapter):
    image_processor_class = CLIPImageProcessorPil
    image_token = "<image>"

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        return dict(self.image_processor(images=list(images), return_tensors="pt"))

    def encode(self, pixels: dict[str, Tensor], attention: bool = False) -> list[Visual]:
        values = pixels["pixel_values"].to(self.device, self.model.dtype)
        layer = self.feature_layer.self_attn
        with captured(layer.q_proj, layer.k_proj) if attention else nullcontext() as outputs:
            tokens = self.model.model.get_image_features(pixel_values=values).pooler_output
        rows = cls_attention(*outputs, layer.num_heads, layer.scale) if attention else [None] * len(tokens)
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        return [Visual(t, (side, side), row) for t, row in zip(tokens, rows, strict=True)]

    @property
    def feature_layer(self):
        """The encoder layer whose output the projector takes: hidden_states[-2] is what layers[-2] puts out."""
        index = self.model.config.vision_feature_layer
        return self.model.model.vision_tower.encoder.layers[index if index < 0 else index - 1]


def cls_attention(q: Tensor, k: Tensor, n_heads: int, scale: float) -> Tensor:
    """Attention [B, n_visual] of the CLS token to every patch, mean over heads, from q, k [B, 1 + n_visual, dim]."""
    q, k = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k))
    logits = (q[:, :, :1] @ k.mT) * scale
    return torch.softmax(logits, -1, dtype=torch.float32)[:, :, 0, 1:].mean(1)
