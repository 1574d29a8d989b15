"""LLaVA-1.5: 16 tokens an image."""

from transformers import CLIPImageProcessorPil

from families import CLIP, EDGE, IMAGE, LLAMA, LLAVA_TEMPLATE, SQUARE, find_cls_attention

CONFIGS = {"llava": dict(vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE)}
TEMPLATE = LLAVA_TEMPLATE


def make_processor(family):
    return CLIPImageProcessorPil(size=EDGE, crop_size=SQUARE)


def write(family, image, inputs, k):
    return "<image>" * 16 + "\n"


def find_attention(family, eager, image, pixels, recorded):
    (tile,) = find_cls_attention(eager.model.model.vision_tower.encoder.layers[-2].self_attn, recorded)
    return tile
