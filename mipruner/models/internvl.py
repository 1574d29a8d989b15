"""InternVL: an image is up to twelve tiles and a thumbnail; pixel shuffle merges four patches into one token."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GotOcr2ImageProcessorPil, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from mipruner.models.llava import LlavaAdapter
from mipruner.prompt import Media, Video, Visual


class InternVLAdapter(LlavaAdapter):
    """Adapter for images and videos. The tokens of all tiles share one budget.

    A frame of a video is one tile. The prompt numbers the frames.
    """

    model_types = ("internvl",)
    image_processor_class: ClassVar[type[ImageProcessingMixin]] = GotOcr2ImageProcessorPil
    signals = LlavaAdapter.signals - {"cls_hidden", "project"}  # the projector reads four patches at once

    def write_placeholders(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        return super().write_placeholders(tokenizer) | {"video": "<video>"}  # replaced by frames with image tokens

    def preprocess(self, image: Media) -> dict[str, Any]:
        is_video = isinstance(image, Video)
        images = list(image.frames) if isinstance(image, Video) else [image]
        values = self.image_processor(images=images, crop_to_patches=not is_video, return_tensors="pt")["pixel_values"]
        return {"pixel_values": values} | ({"times": image.times} if isinstance(image, Video) else {})

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        return (0, 0, *size)

    def lay_out(self, visual: Visual) -> tuple[str, list[int]]:
        image = f"{self.tokenizer.start_image_token}{self.chat.placeholders['image']}{self.tokenizer.end_image_token}"
        if not visual.is_video:
            return image, [len(visual.rows)]
        n_frames = len(visual.times)
        text = "\n".join(f"Frame{k + 1}: {image}" for k in range(n_frames))
        return text, [len(visual.rows) // n_frames] * n_frames

    def attention_modules(self, is_video: bool) -> tuple[nn.Module, ...]:
        layer = self.tower(is_video).encoder.layer[self.model.config.vision_feature_layer]
        return layer.attention, layer, layer.attention.q_norm, layer.attention.k_norm

    def split_pixels(self, is_video: bool, inputs: dict[str, Any], runs: Sequence[int]) -> list[dict[str, Any]]:
        """One image per run of placeholders.

        A video frame counts as an image, because the arguments do not show that it belongs to a video.
        """
        n_tokens = int(self.side * self.model.config.downsample_ratio) ** 2
        tiles = inputs["pixel_values"].split([n // n_tokens for n in runs])
        return [{"pixel_values": one} for one in tiles]

    def split_rows(self, pooled: Sequence[Tensor] | Tensor, pixels: Sequence[dict[str, Any]]) -> list[Tensor]:
        assert isinstance(pooled, Tensor)
        return [rows.flatten(0, 1) for rows in pooled.split([len(one["pixel_values"]) for one in pixels])]

    def arrange(self, tiles: Tensor, one: dict[str, Any]) -> Tensor:
        """Mean of the four patches of each token."""
        square = tiles.unflatten(1, (self.side, self.side))
        merged = self.model.model.pixel_shuffle(square, scale_factor=self.model.config.downsample_ratio)
        return merged.flatten(0, 2).unflatten(-1, (-1, tiles.shape[-1])).mean(-2)

    def grid(self, one: dict[str, Any]) -> tuple[int, ...] | None:
        side = int(self.side * self.model.config.downsample_ratio)
        n_tiles = len(one["pixel_values"])
        if "times" in one:
            return (n_tiles, side, side)
        return (side, side) if n_tiles == 1 else None
