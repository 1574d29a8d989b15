"""Tiny random checkpoints as published ones are: names and layout of weights, tokenizer, chat template, processor."""

import re

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Mistral3Config,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

import families
import tiny
from families import LLAVA_TEMPLATE, internvl, qwen_vl
from families.llava_next import TILES

WIDE = dict(hidden_size=128, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
"""Heads of 64, which vLLM wants on a CPU."""
TEXT = families.TEXT | WIDE
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8]}
SQUARE = {"height": 56, "width": 56}
TOWER = families.TOWER | {"image_size": 112}
NAMES = {
    "mistral3": ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    "smolvlm": (
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
    ),
    "gemma3": ("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
}
"""Ids around image tokens that `tiny` has not."""


def tokenizer(family):
    """That of `tiny` with the names of the family."""
    template = {
        "internvl": internvl.TEMPLATE,
        "mistral3": families.template("[IMG]", ""),
        "smolvlm": families.template("<image>", ""),
        "gemma3": families.template("<start_of_image>", ""),
    }.get(family, qwen_vl.TEMPLATE if family.startswith("qwen") else LLAVA_TEMPLATE)
    special = {
        "internvl": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        "gemma3": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        "smolvlm": {
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
            "image_token": "<image>",
        },
    }.get(family, {})
    words = PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer(template)._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=template,
        extra_special_tokens=special,
    )
    words.add_special_tokens({"additional_special_tokens": list(NAMES.get(family, ()))})
    if family == "gemma3":  # vLLM looks them up
        words.add_tokens(["\n" * n for n in range(1, 5)])
    return words


def id_of(family, name):
    return tokenizer(family).convert_tokens_to_ids(name)


def config_of(family):
    """That of `tiny` with `WIDE`, or one of this module."""
    text = TEXT | {"vocab_size": 320}
    match family:
        case "mistral3":
            vision = PixtralVisionConfig(
                **TOWER, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
            )
            return Mistral3Config(
                vision_config=vision,
                text_config=MistralConfig(**text, head_dim=64, sliding_window=None),
                image_token_index=id_of(family, "[IMG]"),
                spatial_merge_size=2,
            )
        case "smolvlm":
            vision = {key: value for key, value in TOWER.items() if key != "image_size"} | {"image_size": 56}
            image = id_of(family, "<image>")
            return SmolVLMConfig(
                vision_config=vision,
                text_config=LlamaConfig(**text),
                image_token_id=image,
                scale_factor=2,
                pad_token_id=0,
            )
        case "gemma3":
            sliding = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4096}
            boi, image, eoi = (id_of(family, name) for name in NAMES[family])
            return Gemma3Config(
                vision_config=TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
                text_config=text | sliding | {"head_dim": 64, "query_pre_attn_scalar": 2, "tie_word_embeddings": True},
                boi_token_index=boi,
                eoi_token_index=eoi,
                image_token_index=image,
                mm_tokens_per_image=16,
            )
    text, vision = dict(WIDE), {}
    if family.startswith("qwen"):
        text["rope_parameters"] = qwen_vl.CONFIGS[family]["text_config"]["rope_parameters"] | MROPE
    if family.startswith("qwen3"):
        vision["out_hidden_size"] = 128
    config = tiny.config_of(family, text, vision)
    match family:
        case "qwen2_vl":
            config.vision_config.hidden_size = 128
        case "qwen2_5_vl":
            config.vision_config.out_hidden_size = 128
        case "qwen3_vl_moe":
            config.text_config.head_dim, config.text_config.norm_topk_prob = 64, True
        case "qwen3_5":
            text = config.text_config
            text.head_dim, text.linear_key_head_dim, text.linear_value_head_dim = 64, 64, 64
        case "llava_onevision":
            config.vision_aspect_ratio = "anyres_max_9"  # what vLLM's model has in its code
    return config


def processor_of(family):
    """The family's processor as a published checkpoint has it, with the sizes of `tiny`."""
    words = tokenizer(family)
    template = {"chat_template": words.chat_template}
    match family:
        case "llava_next":
            image = LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=TILES)
            options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
            return LlavaNextProcessor(image, words, **template, **options)
        case "llava_onevision":
            image = LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=TILES)
            options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
            options["vision_aspect_ratio"] = "anyres_max_9"
            video = LlavaOnevisionVideoProcessor(size=SQUARE)
            return LlavaOnevisionProcessor(image, words, video, **template, **options)
        case "internvl":
            image = GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4)
            return InternVLProcessor(image, words, InternVLVideoProcessor(size=SQUARE), image_seq_length=4, **template)
        case "mistral3":
            image = PixtralImageProcessor(patch_size=28, size={"longest_edge": 112})
            return PixtralProcessor(image, words, patch_size=14, spatial_merge_size=2, **template)
        case "smolvlm":
            image = SmolVLMImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
            return SmolVLMProcessor(image, words, SmolVLMVideoProcessor(), image_seq_len=4, **template)
        case "gemma3":
            image = Gemma3ImageProcessor(size={"height": 112, "width": 112})
            return Gemma3Processor(image, words, image_seq_length=16, **template)
    image = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 160 * 160})
    if family.startswith("qwen3"):
        return Qwen3VLProcessor(image, words, Qwen3VLVideoProcessor(), **template)
    cls = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}[family]
    video = Qwen2VLVideoProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 90 * 90})
    return cls(image, words, video, **template)


def published(family, name, weight):
    """Name and layout of a weight in published checkpoints, from those that transformers saves."""
    if family.startswith("llava") or family == "gemma3":
        name = re.sub(r"^(model\.)?vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    is_expert = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    return name, weight.transpose(-1, -2).contiguous() if is_expert else weight


def save(family, folder):
    """Random weights, tokenizer and processor into a folder; returns the model and its processor."""
    torch.manual_seed(0)
    config = config_of(family)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or "newline" in name:
                is_scaled = family == "gemma3" and name.endswith("embed_tokens.weight")  # or each token follows itself
                weight.normal_(0, 0.01 if is_scaled else 0.1)
    model.save_pretrained(folder)
    processor = processor_of(family)
    processor.save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file(dict(published(family, *one) for one in load_file(path).items()), path, {"format": "pt"})
    return model, processor
