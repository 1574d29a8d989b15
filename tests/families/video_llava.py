"""Video-LLaVA: 16 tokens an image, 17 a frame."""

import torch
from transformers import VideoLlavaImageProcessor

from families import CLIP, EDGE, IMAGE, LLAMA, LLAVA_TEMPLATE, SQUARE, VIDEO, find_cls_attention
from mipruner.models import Video

CONFIGS = {"video_llava": dict(vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE, video_token_index=VIDEO)}
TEMPLATE = LLAVA_TEMPLATE


def make_processor(family):
    return VideoLlavaImageProcessor(size=EDGE, crop_size=SQUARE)


def make_videos(family, clips, prompts, dtype):
    values = [
        next(iter(make_processor(family)(images=list(clip.frames), return_tensors="pt").values())) for clip in clips
    ]
    return {"pixel_values_videos": torch.stack(values).to(dtype)}


def write(family, one, inputs, k):
    if isinstance(one, Video):
        return "<video>" * (17 * len(one.frames)) + "\n"
    return "<image>" * 16 + "\n"


def find_attention(family, eager, one, pixels, recorded):
    model = eager.model.model
    tower = model.video_tower if isinstance(one, Video) else model.image_tower
    tiles = find_cls_attention(tower.encoder.layers[-2].self_attn, recorded)
    return [value for tile in tiles for value in tile]
