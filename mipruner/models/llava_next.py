"""LLaVA-NeXT and LLaVA-OneVision: an image is a downscaled copy and crops at a higher resolution.

The crops are joined again, without padding, and each line of patches ends with a newline row. Newline rows are not
patches: like text, they are not scored and always kept.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlavaNextImageProcessorPil, LlavaOnevisionImageProcessorPil
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.utils import ModelOutput

from mipruner.errors import InputError
from mipruner.models.llava import LlavaAdapter
from mipruner.prompt import Media, Video


class LlavaNextAdapter(LlavaAdapter):
    """Adapter for images. The tokens of all crops share one budget."""

    model_types = ("llava_next",)
    image_processor_class: ClassVar[type[ImageProcessingMixin]] = LlavaNextImageProcessorPil
    signals = LlavaAdapter.signals - {"cls_hidden", "project"}  # merged rows keep their places among the crops

    def preprocess(self, image: Media) -> dict[str, Any]:
        out = self.image_processor(images=[image], return_tensors="pt")
        return {"pixel_values": out["pixel_values"][0], "image_sizes": out["image_sizes"]}

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        return (0, 0, *size)

    def run_encoder(self, pixels: Sequence[dict[str, Any]]) -> ModelOutput:
        sizes = torch.cat([one["image_sizes"] for one in pixels]).to(self.device)
        return self.model.model.get_image_features(pixel_values=self.join_tiles(pixels), image_sizes=sizes)

    def split_pixels(self, is_video: bool, inputs: dict[str, Any], runs: Sequence[int]) -> list[dict[str, Any]]:
        pinpoints, edge = self.model.config.image_grid_pinpoints, self.model.config.vision_config.image_size
        pairs = zip(inputs["pixel_values"], inputs["image_sizes"], strict=True)
        return [
            {
                "pixel_values": tiles[: image_size_to_num_patches(size, pinpoints, edge)],
                "image_sizes": size[None],
            }
            for tiles, size in pairs
        ]

    def pack(self, tiles: Tensor, one: dict[str, Any], newline: Tensor | None = None) -> Tensor:
        """Pack crops [n_tiles, patches, c] into rows [n, c] by the model's own function, with a newline [c] or None."""
        return self.model.model.pack_image_features(
            (tiles,), one["image_sizes"], vision_feature_select_strategy="default", image_newline=newline
        )[0][0]

    def arrange(self, tiles: Tensor, one: dict[str, Any]) -> Tensor:
        return self.pack(tiles, one)

    def is_candidate(self, one: dict[str, Any]) -> Tensor:
        patches = torch.ones(len(one["pixel_values"]), self.side**2, 1, device=self.device)
        return self.pack(patches, one, newline=patches.new_zeros(1))[:, 0] > 0

    def grid(self, one: dict[str, Any]) -> tuple[int, ...] | None:
        return None


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """Adapter for one image, or for videos. A frame is one tile with 2 x 2 pooled patches. A newline row ends a video.

    Several images in one prompt are refused: the model was trained with another tiling for them.
    """

    model_types = ("llava_onevision",)
    image_processor_class: ClassVar[type[ImageProcessingMixin]] = LlavaOnevisionImageProcessorPil

    def kinds(self, images: Iterable[Media]) -> list[str]:
        kinds = super().kinds(images)
        if len(kinds) > 1 and "image" in kinds:
            raise InputError("LLaVA-OneVision takes one image per prompt here: ask about each by itself")
        return kinds

    def preprocess(self, image: Media) -> dict[str, Any]:
        if not isinstance(image, Video):
            return super().preprocess(image)
        processor = self.image_processor
        size = (processor.size["width"], processor.size["height"])
        frames = [frame.convert("RGB").resize(size, processor.resample) for frame in image.frames]
        values = processor(images=[frames], return_tensors="pt")["pixel_values"]
        return {"pixel_values": values[:, 0], "times": image.times}  # tile 0 is the whole frame

    def run_encoder(self, pixels: Sequence[dict[str, Any]]) -> ModelOutput:
        if "times" not in pixels[0]:
            return super().run_encoder(pixels)
        return self.model.model.get_video_features(self.join_tiles(pixels)[None])

    def split_pixels(self, is_video: bool, inputs: dict[str, Any], runs: Sequence[int]) -> list[dict[str, Any]]:
        if not is_video:
            return super().split_pixels(is_video, inputs, runs)
        (videos,) = (value for name, value in inputs.items() if name.startswith("pixel_values"))
        return [{"pixel_values": frames, "times": tuple(range(len(frames)))} for frames in videos]

    def split_rows(
        self, pooled: Sequence[Tensor] | Tensor, pixels: Sequence[dict[str, Any]]
    ) -> Sequence[Tensor] | Tensor:
        if "times" not in pixels[0]:
            return pooled
        assert isinstance(pooled, Tensor)
        counts = [len(one["pixel_values"]) * ((self.side + 1) // 2) ** 2 for one in pixels]
        frames = pooled[:, : sum(counts) // len(pooled)].flatten(0, 1)  # without the newlines, which 5.17 does not add
        newline = self.model.model.image_newline[None].to(frames)
        return [torch.cat([rows, newline]) for rows in frames.split(counts)]

    def pack(self, tiles: Tensor, one: dict[str, Any], newline: Tensor | None = None) -> Tensor:
        if "times" not in one:
            return self.model.model.pack_image_features(
                (tiles,),
                one["image_sizes"],
                image_newline=newline,
                vision_aspect_ratio=self.model.config.vision_aspect_ratio,
            )[0][0]
        pooled = self.model.model.apply_pooling(tiles).flatten(0, 1)
        return pooled if newline is None else torch.cat([pooled, newline[None]])

    def grid(self, one: dict[str, Any]) -> tuple[int, ...] | None:
        side = (self.side + 1) // 2
        return (len(one["pixel_values"]), side, side) if "times" in one else None
