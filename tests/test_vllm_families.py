"""Each family inside vLLM on a tiny random checkpoint, token for token as `Pipeline`: `make test-vllm`."""

import re

import pytest
import torch

pytest.importorskip("mipruner_vllm", reason="vLLM lives in an environment of its own: make test-vllm")

from safetensors.torch import load_file, save_file
from transformers import (
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

import tiny
from mipruner.decoding import Decoding
from mipruner.models import FAMILIES, Prompt
from mipruner.pipeline import Pipeline
from mipruner.pruners import PRUNERS
from test_vllm import ask, engine, message, tokens

WIDE = dict(hidden_size=128, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8]}
SIZES = {"llava_next": (56, 112), "llava_onevision": (56, 112), "internvl": (56, 56)}
"""Width and height of images that no processor resizes: torchvision's resizing, which vLLM uses, differs from PIL's."""
SQUARE = {"height": 56, "width": 56}


def config_of(family, patch):
    """That of `tiny`, with heads of 64, which vLLM wants on a CPU."""
    patch.setattr(tiny, "TEXT", tiny.TEXT | WIDE)
    patch.setattr(tiny, "MROPE", MROPE)
    patch.setattr(tiny, "QWEN3_VISION", tiny.QWEN3_VISION | {"out_hidden_size": 128})
    config = tiny.config_of(family)
    match family:
        case "qwen2_vl":
            config.vision_config.hidden_size = 128
        case "qwen2_5_vl":
            config.vision_config.out_hidden_size = 128
        case "qwen3_vl_moe":
            config.text_config.head_dim, config.text_config.norm_topk_prob = 64, True
        case "llava_onevision":
            config.vision_aspect_ratio = "anyres_max_9"  # what vLLM's model has in its code
    return config


def processor_of(family):
    """The family's processor as a published checkpoint has it, with the sizes of `tiny`."""
    if family == "llava_next":
        image = LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=tiny.TILES)
        options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        words = tiny.tokenizer(tiny.LLAVA_TEMPLATE)
        return LlavaNextProcessor(image, words, chat_template=tiny.LLAVA_TEMPLATE, **options)
    if family == "llava_onevision":
        image = LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=tiny.TILES)
        options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
        parts = image, tiny.tokenizer(tiny.LLAVA_TEMPLATE), LlavaOnevisionVideoProcessor(size=SQUARE)
        options["vision_aspect_ratio"] = "anyres_max_9"
        return LlavaOnevisionProcessor(*parts, chat_template=tiny.LLAVA_TEMPLATE, **options)
    if family == "internvl":
        image = GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4)
        names = {"start": "<img>", "end": "</img>", "context": "<IMG_CONTEXT>"}
        special = {f"{place}_image_token": token for place, token in names.items()} | {"video_token": "<video>"}
        words = PreTrainedTokenizerFast(
            tokenizer_object=tiny.tokenizer()._tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            chat_template=tiny.INTERN_TEMPLATE,
            extra_special_tokens=special,
        )
        video = InternVLVideoProcessor(size=SQUARE)
        return InternVLProcessor(image, words, video, image_seq_length=4, chat_template=tiny.INTERN_TEMPLATE)
    image = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 160 * 160})
    words = tiny.tokenizer(tiny.QWEN_TEMPLATE)
    if family == "qwen3_vl_moe":
        image = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 160 * 160})
        return Qwen3VLProcessor(image, words, Qwen3VLVideoProcessor(), chat_template=tiny.QWEN_TEMPLATE)
    cls = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}[family]
    return cls(image, words, Qwen2VLVideoProcessor(), chat_template=tiny.QWEN_TEMPLATE)


def published(family, name, weight):
    """Name and layout of a weight in published checkpoints, from those that transformers saves."""
    if family.startswith("llava"):
        name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    is_expert = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    return name, weight.transpose(-1, -2).contiguous() if is_expert else weight


def checkpoint(family, folder, patch):
    """Random weights, tokenizer and processor in a folder; returns the adapter around the same weights."""
    torch.manual_seed(0)
    config = config_of(family, patch)
    model = tiny.CLASSES[family]._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or "newline" in name:
                weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    processor = processor_of(family)
    processor.save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file(dict(published(family, *one) for one in load_file(path).items()), path, {"format": "pt"})
    return FAMILIES[family](model, processor.tokenizer, tiny.processor_of(family))


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen2_5_vl", "llava_next", "llava_onevision", "internvl", "qwen3_vl_moe"]
)
def test_a_family_answers_as_in_pipeline_in_one_piece_and_in_many(family, tmp_path, monkeypatch):
    adapter = checkpoint(family, tmp_path, monkeypatch)
    width, height = SIZES.get(family, (84, 56))
    first, second = tiny.picture(0, width, height), tiny.picture(1, height, width)
    asked = [("What is it ?", first), ("Which colour ?", first), ("How many ?", second), ("Why ?", second)]
    if family != "llava_onevision":  # several images are no tiles there
        asked.append(("Which is larger ?", first, second))
    pieces = 192 if family == "llava_onevision" else 96
    answers = set()
    with engine(str(tmp_path), max_num_batched_tokens=pieces, block_size=32) as llm:
        for keep in (1.0, 0.5, 0.25, 0.5):  # the last from a warm prefix cache
            pipeline = Pipeline(adapter, PRUNERS["mi"](lam=0.5), keep, Decoding(max_new_tokens=8))
            expected = [answer.tokens for text, *images in asked for answer in pipeline([Prompt(text, images)])]
            assert tokens(ask(llm, [message(*one) for one in asked], keep, n=8)) == expected, keep
            answers |= {tuple(one) for one in expected}
    assert len(answers) > 6  # what was kept changes what is said
