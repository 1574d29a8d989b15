"""Tiny random models of types without an adapter, saved with a processor of their own, whose tokenizer is made here."""

from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerFast

from any_recipes import OVERRIDES
from any_tiny import IMAGE, VOCAB, build
from tiny import byte_tokenizer

BYTES = 10
IMAGE_TOKENS = {
    "gemma3": "<image_soft_token>",
    "idefics3": "<image>",
    "paddleocr_vl": "<|IMAGE_PLACEHOLDER|>",
    "mistral3": "[IMG]",
    "smolvlm": "<image>",
    "glm4v": "<|image|>",
    "llama4": "<|patch|>",
}
WRITTEN = IMAGE_TOKENS | {
    "gemma3": "<start_of_image>",
    "glm4v": "<|begin_of_image|><|image|><|end_of_image|>",
    "llama4": "<|image|>",
}
"""What the chat template writes for an image."""
NAMED = {
    "gemma3": {
        "boi_token": ("<start_of_image>", "boi_token_index"),
        "eoi_token": ("<end_of_image>", "eoi_token_index"),
    },
    "glm4v": {"video_token": ("<|video|>", "video_token_id")},
}
TILED = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
AROUND = {
    "mistral3": ["[IMG_BREAK]", "[IMG_END]"],
    "glm4v": ["<|begin_of_image|>", "<|end_of_image|>"],
    "llama4": ["<|image|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>"],
}
"""Further special tokens, from id 5 on."""
NEEDS = {
    "mistral3": ["torchvision"],
    "smolvlm": ["torchvision", "num2words"],
    "glm4v": ["torchvision"],
    "llama4": ["torchvision"],
}
"""Packages that the processor needs."""


def template(image: str) -> str:
    return (
        "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "\n{% else %}{{ c['text'] }}"
        "{% endif %}{% endfor %}{% endif %}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
    )


def tokenizer(kind: str, config) -> PreTrainedTokenizerFast:
    """A token a byte, and the special tokens at the ids that the config names."""
    named = {"image_token": (IMAGE_TOKENS[kind], IMAGE)}
    named |= {name: (token, getattr(config, entry)) for name, (token, entry) in NAMED.get(kind, {}).items()}
    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<turn>": 3, "</turn>": 4} | dict(named.values())
    special |= {token: 5 + k for k, token in enumerate(AROUND.get(kind, TILED))}
    return byte_tokenizer(
        special,
        BYTES,
        VOCAB,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={name: token for name, (token, _) in named.items()},
    )


def gemma3(c, words, chat):
    side = {"height": c.vision_config.image_size, "width": c.vision_config.image_size}
    images = transformers.Gemma3ImageProcessorPil(size=side)
    return transformers.Gemma3Processor(images, words, chat, image_seq_length=c.mm_tokens_per_image)


def idefics3(c, words, chat):
    side = c.vision_config.image_size
    sizes = dict(size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side})
    n = (side // c.vision_config.patch_size // c.scale_factor) ** 2
    if c.model_type == "smolvlm":
        images, videos = transformers.SmolVLMImageProcessor(**sizes), transformers.SmolVLMVideoProcessor()
        return transformers.SmolVLMProcessor(images, words, videos, image_seq_len=n, chat_template=chat)
    images = transformers.Idefics3ImageProcessorPil(**sizes)
    return transformers.Idefics3Processor(images, words, image_seq_len=n, chat_template=chat)


def paddleocr_vl(c, words, chat):
    sizes = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    patches = dict(patch_size=c.vision_config.patch_size, merge_size=c.vision_config.spatial_merge_size)
    if c.model_type == "glm4v":
        images = transformers.Glm4vImageProcessor(size=sizes, **patches)
        videos = transformers.Glm4vVideoProcessor(**patches)
        return transformers.Glm4vProcessor(images, words, videos, chat_template=chat)
    images = transformers.PaddleOCRVLImageProcessorPil(size=sizes, **patches)
    return transformers.PaddleOCRVLProcessor(images, words, chat_template=chat)


def mistral3(c, words, chat):
    patch = c.vision_config.patch_size
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 112}, patch_size=patch)
    options = dict(patch_size=patch, spatial_merge_size=c.spatial_merge_size, chat_template=chat)
    return transformers.PixtralProcessor(images, words, **options)


def llama4(c, words, chat):
    side, vision = c.vision_config.image_size, c.vision_config
    images = transformers.Llama4ImageProcessor(size={"height": side, "width": side}, max_patches=4)
    options = dict(patch_size=vision.patch_size, pixel_shuffle_ratio=vision.pixel_shuffle_ratio, chat_template=chat)
    return transformers.Llama4Processor(images, words, **options)


MAKE = {
    "gemma3": gemma3,
    "idefics3": idefics3,
    "smolvlm": idefics3,
    "paddleocr_vl": paddleocr_vl,
    "glm4v": paddleocr_vl,
    "mistral3": mistral3,
    "llama4": llama4,
}
"""The type's own processor, for the sizes of the tiny model."""


def save(kind: str, folder: Path) -> Path:
    model = build(kind, OVERRIDES)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    MAKE[kind](model.config, tokenizer(kind, model.config), template(WRITTEN[kind])).save_pretrained(folder)
    return folder
