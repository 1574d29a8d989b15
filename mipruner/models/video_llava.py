"""Video-LLaVA: LLaVA-1.5 with a second vision encoder for videos. Frames keep their CLS token."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import VideoLlavaImageProcessor
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import ModelOutput

from mipruner.models.llava import LlavaAdapter
from mipruner.prompt import Media, Video

LLAVA_V1 = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: {image}\n{text} ASSISTANT:"
)
"""Conversation of Video-LLaVA's evaluation."""


class VideoLlavaAdapter(LlavaAdapter):
    """Adapter for images and videos. A frame has 257 rows: 256 patches and the CLS token, which is always kept."""

    model_types = ("video_llava",)
    prompts: ClassVar[dict[str, str]] = {"llava_v1": LLAVA_V1}
    image_processor_class: ClassVar[type[ImageProcessingMixin]] = VideoLlavaImageProcessor
    signals = LlavaAdapter.signals - {"cls_hidden", "project"}  # CLS rows are kept in any case

    def preprocess(self, image: Media) -> dict[str, Any]:
        if not isinstance(image, Video):
            return super().preprocess(image)
        return {"pixel_values": self.normalize(image.frames), "times": image.times}

    def tower(self, is_video: bool) -> Any:
        return self.owner.video_tower if is_video else self.owner.image_tower

    def run_encoder(self, pixels: Sequence[dict[str, Any]]) -> ModelOutput:
        values = self.join_tiles(pixels)
        if "times" in pixels[0]:
            return self.model.model.get_video_features(values[None])
        return self.model.model.get_image_features(values)

    def split_pixels(self, is_video: bool, inputs: dict[str, Any], runs: Sequence[int]) -> list[dict[str, Any]]:
        (values,) = (value for name, value in inputs.items() if name.startswith("pixel_values"))
        if is_video:
            return [{"pixel_values": frames, "times": tuple(range(len(frames)))} for frames in values]
        return [{"pixel_values": one[None]} for one in values]

    def split_rows(
        self, pooled: Sequence[Tensor] | Tensor, pixels: Sequence[dict[str, Any]]
    ) -> Sequence[Tensor] | Tensor:
        if "times" not in pixels[0]:
            return pooled
        assert isinstance(pooled, Tensor)
        return [rows.flatten(0, 1) for rows in pooled.split([len(one["pixel_values"]) for one in pixels])]

    def is_candidate(self, one: dict[str, Any]) -> Tensor | None:
        if "times" not in one:
            return None
        rows = torch.ones(len(one["pixel_values"]), 1 + self.side**2, dtype=torch.bool, device=self.device)
        rows[:, 0] = False
        return rows.flatten()

    def grid(self, one: dict[str, Any]) -> tuple[int, ...]:
        patches = (self.side, self.side)
        return (len(one["pixel_values"]), *patches) if "times" in one else patches
