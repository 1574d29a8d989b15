"""LLaVA-1.5: CLIP patches of one layer, an MLP, a Llama with plain positions."""

from collections.abc import Sequence, Set
from contextlib import nullcontext
from typing import Any

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

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """CLIP's processor crops the centre square."""
        (width, height), side = size, min(size)
        left, top = (width - side) / 2, (height - side) / 2
        return (left, top, left + side, top + side)

    def encode(self, pixels: dict[str, Tensor], signals: Set[str] = frozenset()) -> list[Visual]:
        values = pixels["pixel_values"].to(self.device, self.model.dtype)
        layer = self.feature_layer
        watched = captured(layer, layer.self_attn.q_proj, layer.self_attn.k_proj) if signals else nullcontext()
        with watched as outputs:
            tokens = self.model.model.get_image_features(pixel_values=values).pooler_output
        rows = self.vision_signals(*outputs, signals) if signals else {}
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        return [Visual(t, (side, side), {name: row[k] for name, row in rows.items()}) for k, t in enumerate(tokens)]

    def vision_signals(self, hidden: Tensor, q: Tensor, k: Tensor, names: Set[str]) -> dict[str, Sequence[Any]]:
        """The named fields of `Features`, one entry a picture, from hidden, q, k [B, 1 + n_visual, d_encoder]."""
        attn = self.feature_layer.self_attn
        known = {
            "attention": lambda: cls_attention(q, k, attn.num_heads, attn.scale),
            "hidden": lambda: hidden[:, 1:],
            "cls_hidden": lambda: hidden[:, :1],
            "keys": lambda: k[:, 1:].unflatten(-1, (attn.num_heads, -1)).mean(-2),
            "project": lambda: [self.model.model.multi_modal_projector] * len(hidden),
        }
        return {name: known[name]() for name in known.keys() & names}

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
