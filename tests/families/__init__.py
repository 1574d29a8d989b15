"""One file per model family: tiny configurations, and by hand what its prompts and its encoder attention must be.

A file has ``CONFIGS`` (fields of the config by model type), ``TEMPLATE``, ``make_processor``, ``write`` (the text of an
image or video in a prompt) and ``find_attention`` (eq. 5 for each token). A family that takes videos has
``make_videos`` (their part of the model's input), too. `tiny` finds the files.
"""

import numpy as np
import torch
from PIL import Image

SPECIAL = {
    "<pad>": 0,
    "<s>": 1,
    "</s>": 2,
    "<image>": 3,
    "<video>": 4,
    "<|vision_start|>": 5,
    "<|vision_end|>": 6,
    "<|image_pad|>": 7,
    "<|video_pad|>": 8,
    "<|im_start|>": 9,
    "<|im_end|>": 10,
    "<img>": 11,
    "</img>": 12,
    "<IMG_CONTEXT>": 13,
}
IMAGE, VIDEO = SPECIAL["<image>"], SPECIAL["<video>"]
N_VOCABULARY = len(SPECIAL) + 256
TEXT = dict(
    vocab_size=N_VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
LLAMA = {"model_type": "llama", **TEXT}
QWEN2 = {"model_type": "qwen2", **TEXT}
TOWER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
)
CLIP = {"model_type": "clip_vision_model", **TOWER}
SQUARE, EDGE = {"height": 56, "width": 56}, {"shortest_edge": 56}


def template(image: str, video: str) -> str:
    """A chat template that writes these texts for an image and for a video."""
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "{% elif c['type'] == 'video' %}"
        "" + video + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}"
    )


LLAVA_TEMPLATE = template("<image>\n", "<video>\n")


def normalize(image: Image.Image, processor) -> np.ndarray:
    """[3, height, width] float32, in the processor's order of rounding."""
    values = (np.asarray(image).transpose(2, 0, 1) * (1 / 255)).astype(np.float32)
    mean, std = (np.float32(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    return (values - mean) / std


def sum_received(weights: torch.Tensor) -> list[float]:
    """Eq. 5 by loops, mean over heads: what each of n patches gets from the others. weights [heads, n, n]"""
    mean = weights.mean(0)
    return [sum(float(mean[i, j]) for i in range(len(mean)) if i != j) for j in range(len(mean))]


def find_cls_attention(attn: torch.nn.Module, recorded) -> list[list[float]]:
    """What the CLS of each tile pays to its patches, mean over heads."""
    (weights,) = [w for module, w in recorded if module is attn]
    return weights.mean(1)[:, 0, 1:].tolist()
