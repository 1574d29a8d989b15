"""Tiny random models of types without an adapter, saved with a processor of their own, whose tokenizer is made here."""

from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerFast

from any_recipes import OVERRIDES
from any_tiny import IMAGE, VOCAB, build
from tiny import byte_tokenizer

BYTES = 10
IMAGE_TOKENS = {"gemma3": "<image_soft_token>", "idefics3": "<image>", "paddleocr_vl": "<|IMAGE_PLACEHOLDER|>"}
WRITTEN = IMAGE_TOKENS | {"gemma3": "<start_of_image>"}
"""What the chat template writes for an image."""
NAMED = {
    "gemma3": {"boi_token": ("<start_of_image>", "boi_token_index"), "eoi_token": ("<end_of_image>", "eoi_token_index")}
}


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
    special |= {"<fake_token_around_image>": 5, "<end_of_utterance>": 6, "<global-img>": 7}
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


def processor(kind: str, model):
    """The type's own, for the sizes of the tiny model."""
    config, words = model.config, tokenizer(kind, model.config)
    vision, chat = config.vision_config, template(WRITTEN[kind])
    if kind == "gemma3":
        side = {"height": vision.image_size, "width": vision.image_size}
        images = transformers.Gemma3ImageProcessorPil(size=side)
        return transformers.Gemma3Processor(images, words, chat, image_seq_length=config.mm_tokens_per_image)
    if kind == "idefics3":
        side = {"longest_edge": vision.image_size}
        images = transformers.Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * vision.image_size}, max_image_size=side
        )
        n = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
        return transformers.Idefics3Processor(images, words, image_seq_len=n, chat_template=chat)
    images = transformers.PaddleOCRVLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112},
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
    )
    return transformers.PaddleOCRVLProcessor(images, words, chat_template=chat)


def save(kind: str, folder: Path) -> Path:
    model = build(kind, OVERRIDES)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor(kind, model).save_pretrained(folder)
    return folder
