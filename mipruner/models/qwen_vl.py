"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: images of any size, four patches per token, M-RoPE positions.

Positions have time, height and width. Tokens always keep their positions in the full prompt, because renumbering would
destroy the grid. The position of a new token is computed from the last position, not from the length of the cache.
"""

from collections.abc import Sequence, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase, Qwen2VLImageProcessorPil
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.utils import ModelOutput
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from mipruner.errors import InputError
from mipruner.intercept import Arguments, Call, Step, captured, intercept
from mipruner.models.adapter import Adapter, VisionOutput
from mipruner.models.encoder_attention import received_attention
from mipruner.prompt import Media, Smaller, Video, Visual


class QwenVLAdapter(Adapter):
    """Adapter for images and videos, several per prompt. Two frames of a video are one time step.

    Parameters
    ----------
    min_pixels, max_pixels : int, optional
        Smallest and largest size of a resized image in pixels; by default those of the model's image processor.
    min_frame_pixels, max_frame_pixels : int
        The same for a frame of a video.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl")
    image_processor_class: ClassVar[type[ImageProcessingMixin]] = Qwen2VLImageProcessorPil
    default_positions = "keep"
    any_size = True
    static_types = frozenset({"qwen2_vl", "qwen2_5_vl"})
    signals: ClassVar[frozenset[str]] = frozenset({"attention", "attention_to_self", "hidden", "keys"})

    def __init__(
        self,
        *args: Any,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        min_frame_pixels: int = 128 * 28 * 28,
        max_frame_pixels: int = 768 * 28 * 28,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if self.positions == "repack":
            raise InputError("positions=repack would destroy the grid of a Qwen-VL image: use keep")
        size = self.image_processor and self.image_processor.size
        self.image_size = size and {
            "shortest_edge": min_pixels or size["shortest_edge"],
            "longest_edge": max_pixels or size["longest_edge"],
        }
        self.frame_size = {"shortest_edge": min_frame_pixels, "longest_edge": max_frame_pixels}

    @property
    def vision(self) -> Any:
        """The vision encoder, a model of transformers."""
        return self.owner.visual

    @property
    def merge(self) -> int:
        """Number of patches along one side of a token."""
        return self.vision.spatial_merge_size

    def n_visual(self, image: Media) -> int:
        if isinstance(image, Video):
            raise InputError("resize makes images smaller, not videos: use downsample")
        assert isinstance(image, Image.Image)
        limits = {"min_pixels": self.image_size["shortest_edge"], "max_pixels": self.image_size["longest_edge"]}
        return self.image_processor.get_number_of_image_patches(image.height, image.width, limits) // self.merge**2

    def preprocess(self, image: Media) -> dict[str, Any]:
        if isinstance(image, Smaller):
            side = self.merge * self.model.config.vision_config.patch_size
            size = tuple(side * n for n in reversed(image.grid))
            small = image.image.convert("RGB").resize(size, self.image_processor.resample)
            out = self.image_processor(images=[small], do_resize=False, return_tensors="pt")
            return {"pixel_values": out["pixel_values"], "grid_thw": out["image_grid_thw"]}
        if not isinstance(image, Video):
            out = self.image_processor(images=[image], size=self.image_size, return_tensors="pt")
            return {"pixel_values": out["pixel_values"], "grid_thw": out["image_grid_thw"]}
        steps = self.model.config.vision_config.temporal_patch_size
        frames = [*image.frames, *[image.frames[-1]] * (-len(image.frames) % steps)]
        out = self.image_processor(images=frames, size=self.frame_size, return_tensors="pt")
        _, height, width = out["image_grid_thw"][0].tolist()
        # The processor repeats an image over the time steps of a patch; a video has one frame per step.
        patches = out["pixel_values"].view(len(frames) // steps, steps, height * width, -1, steps, self.patch_area)
        patches = torch.stack([patches[:, k, :, :, k] for k in range(steps)], -2)
        return {
            "pixel_values": patches.flatten(2).flatten(0, 1),
            "grid_thw": torch.tensor([[len(frames) // steps, height, width]]),
            "times": image.times,
        }

    @property
    def patch_area(self) -> int:
        return self.model.config.vision_config.patch_size**2

    def capture(self, is_video: bool, signals: Set[str]) -> AbstractContextManager[list[Call]]:
        attn = self.vision.blocks[self.attention_block].attn
        watched = (attn, attn.qkv, self.vision.blocks[-1])
        return captured(*watched) if signals & self.signals else nullcontext([])

    @property
    def most_visual(self) -> int:
        return int(self.image_size["longest_edge"] // (self.patch_area * self.merge**2))

    def outline(self, pixels: dict[str, Any]) -> Visual:
        if "times" in pixels:
            raise InputError("the engine answers about one image, not a video: use the pipeline")
        _, height, width = (pixels["grid_thw"][0] // self.merge).tolist()
        return Visual(rows=torch.empty(height * width, 0), grid=(height, width))

    def pad(self, pixels: dict[str, Any], n_visual: int) -> dict[str, Tensor]:
        """Patches in the encoder's order with all that it would compute from the grid, which a CUDA graph cannot.

        Keys are transformers' own names, except for ``is_real`` [n_patches] and ``windows`` [n_patches], the number of
        the window in which a patch sees others (Qwen2.5-VL).
        """
        grids, vision = pixels["grid_thw"], self.vision
        values = pixels["pixel_values"].to(self.model.dtype)
        more = n_visual * self.merge**2 - len(values)
        rows = {
            "pixel_values": values,
            "is_real": torch.ones(len(values), dtype=torch.bool),
            "position_ids": get_vision_position_ids(grids, self.merge),
        }
        if hasattr(vision, "interpolation_mode"):
            side, how = vision.num_grid_per_side, (vision.interpolation_mode, vision.interpolation_align_corners)
            taps = get_vision_interpolation_indices_and_weights(grids, side, *how, self.merge)
            rows |= zip(("interp_indices", "interp_weights"), taps, strict=True)
        padded = {name: pad(x, (0, 0) * (x.dim() - 1) + (0, more)) for name, x in rows.items()}
        if hasattr(vision, "window_size"):
            order, ends = self.windows(grids)
            numbers = torch.arange(len(ends) - 1).repeat_interleave(ends.diff().long())
            padded["windows"] = pad(numbers, (0, more), value=-1)
            padded["window_index"] = torch.cat([order, torch.arange(len(order), n_visual)])
        return padded

    def windows(self, grids: Tensor) -> tuple[Tensor, Tensor]:
        """Order of the tokens inside the blocks, sorted by window, and the patches before the end of each window."""
        patch = self.model.config.vision_config.patch_size
        return get_vision_window_index(grids, self.merge, self.vision.window_size, patch)

    def run_encoder(self, pixels: Sequence[dict[str, Any]]) -> ModelOutput:
        if "is_real" in pixels[0]:
            return self.run_padded(pixels[0])
        values = torch.cat([one["pixel_values"] for one in pixels]).to(self.device)
        return self.model.model.get_image_features(values, self.join_grids(pixels))

    def run_padded(self, one: dict[str, Tensor]) -> ModelOutput:
        """Run the encoder on the output of `pad`: one segment of attention, in which no patch attends to padding.

        Lengths are on the host, so nothing is read back from the device.
        """
        whole = torch.tensor([0, len(one["is_real"])], dtype=torch.int32)
        named = {"cu_seqlens": whole, "position_bias": self.bias(one["is_real"])}
        if "windows" in one:
            named["cu_window_seqlens"] = whole
        named |= {name: x for name, x in one.items() if name not in ("pixel_values", "is_real", "windows")}
        with ExitStack() as stack:
            if "windows" in one:
                own = {"position_bias": self.bias(one["windows"][:, None] == one["windows"])}

                def within(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
                    return args, kwargs | own

                for k, block in enumerate(self.vision.blocks):
                    if k not in self.vision.fullatt_block_indexes:
                        stack.enter_context(intercept(block.attn, Step(within)))
            given = {f"image_{name}": x for name, x in named.items()}
            return self.model.model.get_image_features(one["pixel_values"], self.join_grids([one]), **given)

    def bias(self, sees: Tensor) -> Tensor:
        """What is added to the attention logits: sees [.., n] -> [1, 1, .., n] of 0 and -inf."""
        zeros = torch.zeros(sees.shape, dtype=self.model.dtype, device=sees.device)
        return zeros.masked_fill(~sees, -torch.inf).view(1, 1, -1, len(sees))

    def join_grids(self, pixels: Sequence[dict[str, Any]]) -> Tensor:
        if "is_real" in pixels[0]:  # any of so many patches, on the host
            return torch.tensor([[1, self.merge, len(pixels[0]["is_real"]) // self.merge]])
        return torch.cat([one["grid_thw"] for one in pixels]).to(self.device)

    def split_pixels(self, is_video: bool, inputs: dict[str, Any], runs: Sequence[int]) -> list[dict[str, Any]]:
        grids = inputs["video_grid_thw" if is_video else "image_grid_thw"]
        return [
            {"grid_thw": grid[None]} | ({"times": tuple(range(int(grid[0])))} if is_video else {}) for grid in grids
        ]

    def make_visuals(
        self,
        output: VisionOutput,
        calls: list[Call],
        pixels: Sequence[dict[str, Any]],
        signals: Set[str],
    ) -> list[Visual]:
        names, grids = signals & self.signals, self.join_grids(pixels)
        counts = (grids.prod(-1) // self.merge**2).tolist()
        attn = self.vision.blocks[self.attention_block].attn
        found = self.vision_signals(calls, attn, pixels, names) if names else {}
        found = {name: rows.split(counts) for name, rows in found.items()}
        deepstack = [layer if isinstance(layer, Tensor) else torch.cat(list(layer)) for layer in output.deepstack]
        deepstack_of_each = [layer.split(counts) for layer in deepstack]
        return [
            Visual(
                rows=rows,
                grid=(t, h // self.merge, w // self.merge)[0 if "times" in one else 1 :],
                signals={name: of_each[k] for name, of_each in found.items()},
                deepstack=tuple(layer[k] for layer in deepstack_of_each),
                times=one.get("times", ()),
            )
            for k, (rows, one, (t, h, w)) in enumerate(zip(output.rows, pixels, grids.tolist(), strict=True))
        ]

    @property
    def attention_block(self) -> int:
        """The last vision block with attention over all patches of an image; other blocks of Qwen2.5-VL use windows."""
        return max(getattr(self.vision, "fullatt_block_indexes", None) or [len(self.vision.blocks) - 1])

    def vision_signals(
        self, calls: Sequence[Call], attn: Any, pixels: Sequence[dict[str, Any]], names: Set[str]
    ) -> dict[str, Tensor]:
        """Named fields of `Features` for all images together, averaged over the patches of a token.

        Attention is within an image, or within a time step of a video: the segments of ``cu_seqlens``.
        """
        inside, qkv, hidden = calls
        q, k = qkv.output.unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)[:2]
        q, k = apply_rotary_pos_emb_vision(q, k, *inside.kwargs["position_embeddings"])
        found = {"hidden": hidden.output, "keys": k.mean(-2)}
        if names & {"attention", "attention_to_self"}:
            lengths, is_real = inside.kwargs["cu_seqlens"].diff().tolist(), pixels[0].get("is_real")
            segments = zip(q.split(lengths), k.split(lengths), strict=True)
            received = [received_attention(*segment, attn.scaling, is_real) for segment in segments]
            found |= {
                name: torch.cat(rows)[:, None]
                for name, rows in zip(("attention", "attention_to_self"), zip(*received, strict=True), strict=True)
            }
        order = self.raster_order(pixels)
        tokens = {name: found[name].unflatten(0, (-1, self.merge**2)).mean(1)[order] for name in names}
        return {name: rows[:, 0] if name.startswith("attention") else rows for name, rows in tokens.items()}

    def raster_order(self, pixels: Sequence[dict[str, Any]]) -> Tensor | slice:
        """Index of each token inside the vision blocks, where Qwen2.5-VL sorts tokens by window."""
        if not hasattr(self.vision, "window_size"):
            return slice(None)
        order = pixels[0].get("window_index")
        return (self.windows(self.join_grids(pixels))[0] if order is None else order).argsort()

    def position_ids(self, ids: Tensor, visuals: Sequence[Visual]) -> Tensor:
        """Positions [4, S]: token number, time, height, width."""
        kinds = torch.zeros_like(ids)
        grids: dict[str, list[list[int]]] = {"image": [], "video": []}
        for number, kind in enumerate(grids, 1):
            kinds[ids == self.placeholder_ids[kind]] = number
        for visual in visuals:
            assert visual.grid is not None
            t, h, w = visual.grid if visual.is_video else (1, *visual.grid)
            grids["video" if visual.is_video else "image"].append([t, h * self.merge, w * self.merge])
        optional: dict[str, Any] = {
            f"{kind}_grid_thw": torch.tensor(rows, device=ids.device) for kind, rows in grids.items() if rows
        }
        if hasattr(self.model.config.vision_config, "tokens_per_second"):
            optional["second_per_grid_ts"] = self.seconds_per_step(visuals)
        planes, _ = self.model.model.get_rope_index(ids[None], mm_token_type_ids=kinds[None], **optional)
        return torch.cat([super().position_ids(ids, visuals), planes[:, 0]])

    def seconds_per_step(self, visuals: Sequence[Visual]) -> list[float]:
        steps = self.model.config.vision_config.temporal_patch_size
        return [steps * visual.times[1] if len(visual.times) > 1 else 0.0 for visual in visuals if visual.is_video]


class Qwen3VLAdapter(QwenVLAdapter):
    """Adapter for images and videos. The prompt contains the time in words before each time step of a video.

    These words are not text of the user: they are never pruned and do not score tokens. Each time step has its own
    start and end tokens, so the pair that the chat template writes around a video is removed.
    """

    model_types = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5")
    static_types = frozenset({"qwen3_vl"})

    def write_placeholders(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        config = self.model.config
        ids = [config.vision_start_token_id, config.video_token_id, config.vision_end_token_id]
        return super().write_placeholders(tokenizer) | {"video": "".join(tokenizer.convert_ids_to_tokens(ids))}

    def lay_out(self, visual: Visual) -> tuple[str, list[int]]:
        if not visual.is_video:
            return super().lay_out(visual)
        steps = self.model.config.vision_config.temporal_patch_size
        times = [*visual.times, *[visual.times[-1]] * (-len(visual.times) % steps)]
        means = [(times[k] + times[k + steps - 1]) / 2 for k in range(0, len(times), steps)]
        frame = self.chat.placeholders["video"]
        return "".join(f"<{mean:.1f} seconds>{frame}" for mean in means), [len(visual.rows) // len(means)] * len(means)
