"""LLaVA-NeXT and LLaVA-OneVision: a small version of an image, crops without their padding, a newline a line."""

import numpy as np
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil, LlavaOnevisionImageProcessorPil

from families import (
    CLIP,
    EDGE,
    IMAGE,
    LLAMA,
    LLAVA_TEMPLATE,
    QWEN2,
    SQUARE,
    TOWER,
    VIDEO,
    find_cls_attention,
    normalize,
    sum_received,
)
from mipruner.models import Video

TILES = [[56, 112], [112, 56], [112, 112]]
CONFIGS = {
    "llava_next": dict(vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE, image_grid_pinpoints=TILES),
    "llava_onevision": dict(
        vision_config={"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False},
        text_config=QWEN2,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=TILES,
        vision_aspect_ratio="anyres_max_2",
    ),
}
TEMPLATE = LLAVA_TEMPLATE
WITH_VIDEO = ALONE = {"llava_onevision"}
"""Types that take videos, and those that take one image a prompt."""


def make_processor(family):
    if family == "llava_next":
        return LlavaNextImageProcessorPil(size=EDGE, crop_size=SQUARE, image_grid_pinpoints=TILES)
    return LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=TILES)


def find_canvas(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Rows and columns of patches on the canvas of a tiled image, and lines of padding on each side of the two."""
    width, height = size

    def waste(canvas):  # the canvas that keeps most of the image, then wastes least
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return (-kept, canvas[0] * canvas[1] - kept)

    rows, columns = (side // 14 for side in min(TILES, key=waste))
    if width / height > columns / rows:
        return rows, columns, (rows - int(round(height * columns / width, 7))) // 2, 0
    return rows, columns, 0, (columns - int(round(width * rows / height, 7))) // 2


def shrink(rows: int, columns: int, family: str) -> tuple[int, int]:
    """LLaVA-OneVision scales what has more than two tiles' tokens down."""
    ratio = (rows * columns / (2 * 16)) ** 0.5
    if family == "llava_onevision" and ratio > 1.1:
        return int(rows // ratio), int(columns // ratio)
    return rows, columns


def count_tokens(size: tuple[int, int], family: str) -> int:
    """Tokens of a tiled image: the small one, the crops without padding, a newline a line."""
    rows, columns, above, beside = find_canvas(size)
    rows, columns = shrink(rows - 2 * above, columns - 2 * beside, family)
    return 16 + rows * columns + rows


def make_videos(family, clips, prompts, dtype):
    squeezed = [[frame.resize((56, 56), Image.Resampling.BICUBIC) for frame in clip.frames] for clip in clips]
    values = [[normalize(frame, make_processor(family)) for frame in clip] for clip in squeezed]
    return {"pixel_values_videos": torch.tensor(np.array(values), dtype=dtype)}


def write(family, one, inputs, k):
    if isinstance(one, Video):
        return "<video>" * (4 * len(one.frames) + 1) + "\n"
    return "<image>" * count_tokens(one.size, family) + "\n"


def assemble(scores: list[list[float]], size: tuple[int, int], family: str) -> list[float]:
    """Scores [tiles][16] of a tiled image in the order of its tokens, by loops over the canvas."""
    rows, columns, above, beside = find_canvas(size)
    canvas = [
        [scores[1 + y // 4 * (columns // 4) + x // 4][y % 4 * 4 + x % 4] for x in range(beside, columns - beside)]
        for y in range(above, rows - above)
    ]
    shape = shrink(len(canvas), len(canvas[0]), family)
    if shape != (len(canvas), len(canvas[0])):
        canvas = torch.nn.functional.interpolate(torch.tensor(canvas)[None, None], shape, mode="bilinear")[
            0, 0
        ].tolist()
    return scores[0] + [value for line in canvas for value in line]


def find_attention(family, eager, one, pixels, recorded):
    layers = eager.model.model.vision_tower.encoder.layers
    if family == "llava_next":
        return assemble(find_cls_attention(layers[-2].self_attn, recorded), one.size, family)
    (weights,) = [w for module, w in recorded if module is layers[-1].self_attn]
    tiles = [sum_received(w) for w in weights]
    if not isinstance(one, Video):
        return assemble(tiles, one.size, family)
    squares = torch.tensor(tiles).view(-1, 1, 4, 4)
    return torch.nn.functional.interpolate(squares, (2, 2), mode="bilinear").flatten().tolist()
