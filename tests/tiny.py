"""Tiny random models of every family of `families`, and what their untouched `generate` takes, without any adapter."""

from copy import deepcopy
from functools import cache, lru_cache
from importlib import import_module
from pkgutil import iter_modules

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

import families
from families import SPECIAL
from mipruner.models import FAMILIES, Adapter, Prompt, Video

MODULES = {
    family: module
    for module in [import_module(f"families.{found.name}") for found in iter_modules(families.__path__)]
    for family in module.CONFIGS
}
"""The file of `families` of each model type."""
QWEN = [family for family in MODULES if family.startswith("qwen")]
WITH_VIDEO = [family for family, module in MODULES.items() if hasattr(module, "make_videos") and family != "llava_next"]


def byte_tokenizer(special: dict[str, int], first: int, n: int = 0, **options) -> PreTrainedTokenizerFast:
    """A token a byte from id ``first`` on, so that every text can be written; other ids below ``n`` are unused."""
    vocabulary = special | {c: first + k for k, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"<unused{k}>": k for k in range(n) if k not in vocabulary.values()}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


@cache
def tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        SPECIAL,
        len(SPECIAL),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=chat_template,
        extra_special_tokens={"start_image_token": "<img>", "end_image_token": "</img>"},
    )


def config_of(family: str, text: dict | None = None, vision: dict | None = None):
    """A configuration with grouped-query attention, deepstack, windows, tiles and experts where the family has them."""
    fields = deepcopy(MODULES[family].CONFIGS[family])
    fields["text_config"] |= text or {}
    fields["vision_config"] |= vision or {}
    return AutoConfig.for_model(family, **fields)


def processor_of(family: str):
    return MODULES[family].make_processor(family)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a test in inference mode may be the first that asks, another wants gradients
def tiny(family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, **options) -> Adapter:
    """An adapter around random weights, large enough that every row of the input moves the output."""
    torch.manual_seed(0)
    config = config_of(family)
    config._attn_implementation = attn
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attn).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or "newline" in name:
                weight.normal_(0, 0.25)
            elif "bias" in name:
                weight.normal_(0, 0.1)
    options = getattr(MODULES[family], "OPTIONS", {}) | options
    words = tokenizer(MODULES[family].TEMPLATE)
    return FAMILIES[family](model.to(dtype), words, processor_of(family), **options)


def make_image(seed: int, width: int, height: int) -> Image.Image:
    """Random blocks of colour, so that resizing leaves something to see."""
    blocks = np.random.default_rng(seed).integers(0, 255, (max(1, height // 7), max(1, width // 7), 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def video(seed: int, n_frames: int, width: int = 84, height: int = 56, fps: float = 2.0) -> Video:
    return Video([make_image(100 * seed + k, width, height) for k in range(n_frames)], fps=fps)


@cache
def prompts_of(family: str) -> tuple[Prompt, ...]:
    """Three prompts of different length: one image, two of other sizes, and an image with a video."""
    alone = family in getattr(MODULES[family], "ALONE", ())
    several, last = [make_image(1, 112, 70), make_image(2, 56, 140)], [make_image(3, 90, 60)]
    if family in WITH_VIDEO:
        last = [video(4, 3)] if alone else [video(4, 3), *last]
    several = several[:1] if alone else several
    return (
        Prompt("What color is it ?", [make_image(0, 84, 84)], sample="a"),
        Prompt("Which of the two is larger, the first or the second ?", several, sample="b"),
        Prompt("What happens then ?", last, sample="c"),
    )


def reference(family: str, prompts, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What the family's own processor makes of these prompts, left-padded: the input of an untouched `generate`."""
    processor, words = processor_of(family), tokenizer()
    images = [one for prompt in prompts for one in prompt.images if not isinstance(one, Video)]
    clips = [one for prompt in prompts for one in prompt.images if isinstance(one, Video)]
    inputs: dict[str, torch.Tensor] = {}
    if images:
        out = processor(images=images, return_tensors="pt")
        name = next(name for name in out if name.startswith("pixel_values"))
        inputs["pixel_values_images" if family == "video_llava" else "pixel_values"] = out[name].to(dtype)
        inputs |= {name: out[name] for name in ("image_grid_thw", "image_sizes") if name in out}
    if clips:
        inputs |= MODULES[family].make_videos(family, clips, prompts, dtype)

    texts, seen = [], iter(range(len(images)))
    for prompt in prompts:
        content = ""
        for one in prompt.images:
            content += MODULES[family].write(family, one, inputs, None if isinstance(one, Video) else next(seen))
        text = f"<|im_start|>user\n{content}{prompt.text}<|im_end|>\n<|im_start|>assistant\n"
        texts.append(words(text).input_ids)
    length = max(map(len, texts))
    inputs["input_ids"] = torch.tensor([[0] * (length - len(ids)) + ids for ids in texts])
    inputs["attention_mask"] = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in texts])
    if family in QWEN:
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = ((ids == 7).int() + 2 * (ids == 8).int()).int()
    return inputs
