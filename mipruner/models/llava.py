"""LLaVA-1.5: patches of one ViT layer, an MLP projector, a language model with 1-D positions.

Related families override the number of tiles of an image and the order of their patches.
"""

from collections.abc import Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import ModelOutput

from mipruner.intercept import Call, captured
from mipruner.models.adapter import Adapter, VisionOutput
from mipruner.models.clip import ClipSpace
from mipruner.models.encoder_attention import cls_attention, received_attention
from mipruner.prompt import Media, Prompt, Tokens, Visual

VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {image}\n{text} ASSISTANT:"
)
"""Conversation of LLaVA-1.5's training and evaluation: 35 tokens before the image."""


class LlavaAdapter(Adapter):
    """Adapter for images.

    Parameters
    ----------
    square : bool
        Pad an image to a square with the mean colour, as in LLaVA-1.5's evaluation, instead of cropping its longer
        side.
    clip : str, optional
        Folder or hub id of the CLIP that the vision encoder comes from. Its text tower is loaded when a method needs it
        (CDPruner).
    """

    model_types = ("llava",)
    static_types = frozenset({"llava"})
    prompts: ClassVar[dict[str, str]] = {"vicuna_v1": VICUNA_V1}
    image_processor_class: ClassVar[type[ImageProcessingMixin]] = CLIPImageProcessorPil
    signals: ClassVar[frozenset[str]] = frozenset(
        {"attention", "attention_to_self", "hidden", "cls_hidden", "keys", "project", "valid", "clip_visual"}
    )

    def __init__(self, *args: Any, square: bool = False, clip: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.square, self.clip = square, clip

    @cached_property
    def clip_space(self) -> ClipSpace:
        assert self.clip is not None
        return ClipSpace.load(self.clip, like=cast(Tensor, self.model.get_input_embeddings().weight))

    def text_signals(self, prompt: Prompt, tokens: Tokens, signals: Set[str]) -> dict[str, Any]:
        found = super().text_signals(prompt, tokens, signals)
        if "clip_text" in signals and self.clip is not None:
            found["clip_text"] = self.clip_space.text(prompt.text if prompt.question is None else prompt.question)
        return found

    def preprocess(self, image: Media) -> dict[str, Any]:
        assert isinstance(image, Image.Image)  # `kinds` refuses videos
        if not self.square:
            return {"pixel_values": self.normalize([image])}
        colour = tuple(int(255 * mean) for mean in self.image_processor.image_mean)
        side = max(image.size)
        left, top = (int(-edge) for edge in self.box(image.size)[:2])
        size = self.patch * self.side
        padded = Image.new("RGB", (side, side), colour)
        padded.paste(image.convert("RGB"), (left, top))
        return {
            "pixel_values": self.normalize([padded]),
            "valid": covered(image.width, side, self.side, size)
            & covered(image.height, side, self.side, size)[:, None],
        }

    def normalize(self, images: Sequence[Image.Image]) -> Tensor:
        """One tile [3, height, width] per image, from either of the two layouts of transformers."""
        (values,) = self.image_processor(images=list(images), return_tensors="pt").values()
        return values

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The centre square that CLIP's processor crops, or the square around the padded image."""
        (width, height), side = size, (max if self.square else min)(size)
        left, top = (width - side) / 2, (height - side) / 2
        if self.square:
            left, top = float(-((side - width) // 2)), float(-((side - height) // 2))
        return (left, top, left + side, top + side)

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return _first(self.model.config.vision_config.patch_size)

    @property
    def side(self) -> int:
        """Number of patches along one side of a tile."""
        return _first(self.model.config.vision_config.image_size) // self.patch

    @property
    def most_visual(self) -> int:
        return self.side**2

    def outline(self, pixels: dict[str, Any]) -> Visual:
        return Visual(rows=torch.empty(self.side**2, 0), grid=self.grid(pixels))

    def pad(self, pixels: dict[str, Any], n_visual: int) -> dict[str, Tensor]:
        return pixels | {"pixel_values": pixels["pixel_values"].to(self.model.dtype)}

    def tower(self, is_video: bool) -> Any:
        """The vision encoder, a model of transformers."""
        return self.owner.vision_tower

    def attention_modules(self, is_video: bool) -> tuple[nn.Module, ...]:
        """Modules for encoder attention: attention, layer, query and key projections.

        The layer is the one that the projector reads.

        hidden_states[-2] is the output of layers[-2].
        """
        index = self.model.config.vision_feature_layer
        layer = self.tower(is_video).encoder.layers[index if index < 0 else index - 1]
        return layer.self_attn, layer, layer.self_attn.q_proj, layer.self_attn.k_proj

    def capture(self, is_video: bool, signals: Set[str]) -> AbstractContextManager[list[Call]]:
        return captured(*self.attention_modules(is_video)[1:]) if signals & self.signals else nullcontext([])

    def run_encoder(self, pixels: Sequence[dict[str, Any]]) -> ModelOutput:
        return self.model.model.get_image_features(pixel_values=self.join_tiles(pixels))

    def join_tiles(self, pixels: Sequence[dict[str, Any]]) -> Tensor:
        """All tiles [n_tiles, 3, height, width]."""
        return torch.cat([one["pixel_values"] for one in pixels]).to(self.device, self.model.dtype)

    def split_pixels(self, is_video: bool, inputs: dict[str, Any], runs: Sequence[int]) -> list[dict[str, Any]]:
        return [{"pixel_values": one[None]} for one in inputs["pixel_values"]]

    def make_visuals(
        self,
        output: VisionOutput,
        calls: list[Call],
        pixels: Sequence[dict[str, Any]],
        signals: Set[str],
    ) -> list[Visual]:
        names, attn = signals & self.signals, self.attention_modules("times" in pixels[0])[0]
        rows = self.split_rows(output.rows, pixels)
        found = self.vision_signals(calls, attn, pixels, names) if names else [{}] * len(pixels)
        return [
            Visual(
                rows=own,
                grid=self.grid(one),
                signals=signals_of_one,
                is_candidate=self.is_candidate(one),
                times=one.get("times", ()),
            )
            for own, one, signals_of_one in zip(rows, pixels, found, strict=True)
        ]

    def split_rows(
        self, pooled: Sequence[Tensor] | Tensor, pixels: Sequence[dict[str, Any]]
    ) -> Sequence[Tensor] | Tensor:
        """Rows [n_rows, d] of each image, from ``pooler_output``."""
        return pooled

    def arrange(self, tiles: Tensor, one: dict[str, Any]) -> Tensor:
        """Rearrange values of patches [n_tiles, patches, c] into values of visual tokens [n_visual, c]."""
        return tiles.flatten(0, 1)

    def is_candidate(self, one: dict[str, Any]) -> Tensor | None:
        """See `Visual.is_candidate`."""
        return None

    def grid(self, one: dict[str, Any]) -> tuple[int, ...] | None:
        """See `Visual.grid`."""
        return (self.side, self.side)

    def vision_signals(
        self, calls: Sequence[Call], attn: Any, pixels: Sequence[dict[str, Any]], names: Set[str]
    ) -> list[dict[str, Any]]:
        """Named fields of `Features` for each image, from calls of layer, queries and keys [n_tiles, patches, d]."""
        hidden, q, k = (call.output for call in calls)
        q, k = (x.unflatten(-1, (attn.num_heads, -1)) for x in (q, k))
        first = int(hidden.shape[1] - self.side**2)  # index of patch 0: after the CLS token, if there is one
        known = {"hidden": hidden[:, first:], "keys": k[:, first:].mean(-2)}
        if "clip_visual" in names and self.clip is not None:
            known["clip_visual"] = self.clip_space.visual(hidden[:, first:])
        if "attention" in names and first:
            known["attention"] = cls_attention(q, k, attn.scale)[..., None]
        elif "attention" in names:
            others, own = received_attention(q, k, attn.scale)
            known |= {"attention": others[..., None], "attention_to_self": own[..., None]}
        found, start = [], 0
        for one in pixels:
            tiles = slice(start, start + len(one["pixel_values"]))
            start = tiles.stop
            fields = {name: self.arrange(known[name][tiles], one) for name in known.keys() & names}
            fields |= {name: fields[name][:, 0] for name in fields.keys() & {"attention", "attention_to_self"}}
            if first:
                fields |= {"cls_hidden": hidden[tiles, 0], "project": self.model.model.multi_modal_projector}
            if "valid" in one:
                fields["valid"] = one["valid"].flatten().to(self.device)
            found.append({name: value for name, value in fields.items() if name in names})
        return found


def _first(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[0]


def covered(length: int, side: int, n: int, size: int) -> Tensor:
    """Mask [n] bool of the patches along a side of ``size`` pixels that are not entirely padding.

    An image of ``length`` pixels is in the middle of ``side`` pixels, which are resized to ``size``. As in MMTok's
    public code, its length is rounded to whole pixels of the resized square.
    """
    resized = round(length * size / side)
    start, edges = (size - resized) // 2, torch.arange(n + 1) * (size // n)
    return (edges[1:] > start) & (edges[:-1] < start + resized)
