"""InternVL: four tokens a tile; images and videos are tiles of one tensor, in the order of the prompt."""

import torch
from transformers import GotOcr2ImageProcessorPil

from families import QWEN2, SPECIAL, SQUARE, TOWER, find_cls_attention, template
from mipruner.models import Video

CONFIGS = {
    "internvl": dict(
        vision_config=TOWER | {"image_size": [56, 56], "patch_size": [14, 14], "use_qk_norm": True},
        text_config=QWEN2,
        image_token_id=SPECIAL["<IMG_CONTEXT>"],
    )
}
TEMPLATE = template("<IMG_CONTEXT>\n", "<video>\n")


def make_processor(family):
    return GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4)


def make_tiles(one):
    """[n_tiles, 3, 56, 56]"""
    is_video = isinstance(one, Video)
    frames = list(one.frames) if is_video else [one]
    return make_processor("internvl")(images=frames, crop_to_patches=not is_video, return_tensors="pt")["pixel_values"]


def make_videos(family, clips, prompts, dtype):
    return {"pixel_values": torch.cat([make_tiles(one) for prompt in prompts for one in prompt.images]).to(dtype)}


def write(family, one, inputs, k):
    if isinstance(one, Video):
        lines = [f"Frame{i + 1}: <img>{'<IMG_CONTEXT>' * 4}</img>" for i in range(len(one.frames))]
        return "\n".join(lines) + "\n"
    return f"<img>{'<IMG_CONTEXT>' * (4 * len(make_tiles(one)))}</img>\n"


def find_attention(family, eager, one, pixels, recorded):
    tiles = find_cls_attention(eager.model.model.vision_tower.encoder.layer[-1].attention, recorded)
    return [
        sum(tile[(2 * y + dy) * 4 + 2 * x + dx] for dy in range(2) for dx in range(2)) / 4
        for tile in tiles
        for y in range(2)
        for x in range(2)
    ]
