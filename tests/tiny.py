"""Tiny random models of every family, and what their untouched `generate` takes, built without any adapter."""

from functools import cache, lru_cache

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
)

from mipruner.models import FAMILIES, Adapter, Prompt, Video

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


@cache
def tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A token a byte, so that every text can be written."""
    vocabulary = SPECIAL | {c: len(SPECIAL) + k for k, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=chat_template,
        extra_special_tokens={"start_image_token": "<img>", "end_image_token": "</img>"},
    )


def template(image: str, video: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "{% elif c['type'] == 'video' %}"
        "" + video + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}"
    )


LLAVA_TEMPLATE = template("<image>\n", "<video>\n")
QWEN_TEMPLATE = template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
INTERN_TEMPLATE = template("<IMG_CONTEXT>\n", "<video>\n")

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
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TOWER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
)
QWEN_IDS = dict(image_token_id=7, video_token_id=8, vision_start_token_id=5, vision_end_token_id=6)
QWEN3_VISION = dict(
    depth=4,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    patch_size=14,
    out_hidden_size=32,
    num_position_embeddings=16,
)
ROUTED = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
TILES = [[56, 112], [112, 56], [112, 112]]
LINEAR = dict(
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
)


def qwen2_vision(**fields) -> dict:
    return dict(
        vision_config=dict(depth=4, num_heads=2, patch_size=14, **fields),
        text_config=TEXT | {"rope_parameters": MROPE},
        **QWEN_IDS,
    )


def config_of(family: str):
    """A configuration with grouped-query attention, deepstack, windows, tiles and experts where the family has them."""
    clip = dict(vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE)
    qwen2 = Qwen2Config(**TEXT)
    match family:
        case "llava":
            return LlavaConfig(**clip)
        case "video_llava":
            return VideoLlavaConfig(**clip, video_token_index=VIDEO)
        case "llava_next":
            return LlavaNextConfig(**clip, image_grid_pinpoints=TILES)
        case "llava_onevision":
            tower = SiglipVisionConfig(**TOWER, vision_use_head=False)
            ids = dict(image_token_index=IMAGE, video_token_index=VIDEO)
            tiles = dict(image_grid_pinpoints=TILES, vision_aspect_ratio="anyres_max_2")
            return LlavaOnevisionConfig(vision_config=tower, text_config=qwen2, **ids, **tiles)
        case "internvl":
            tower = TOWER | {"image_size": [56, 56], "patch_size": [14, 14], "use_qk_norm": True}
            return InternVLConfig(vision_config=tower, text_config=qwen2, image_token_id=SPECIAL["<IMG_CONTEXT>"])
        case "qwen2_vl":
            return Qwen2VLConfig(**qwen2_vision(embed_dim=32, hidden_size=32, mlp_ratio=2))
        case "qwen2_5_vl":
            fields = dict(hidden_size=32, out_hidden_size=32, intermediate_size=48)
            fields |= dict(window_size=56, fullatt_block_indexes=[1, 2], tokens_per_second=2)
            return Qwen2_5_VLConfig(**qwen2_vision(**fields))
        case "qwen3_vl":
            vision = QWEN3_VISION | {"deepstack_visual_indexes": [0, 1, 2]}
            text = TEXT | {"head_dim": 8, "rope_parameters": MROPE | {"mrope_interleaved": True}}
            return Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_IDS)
        case "qwen3_vl_moe":
            vision = QWEN3_VISION | {"deepstack_visual_indexes": [0, 1, 2]}
            text = TEXT | {"head_dim": 8, "rope_parameters": MROPE | {"mrope_interleaved": True}} | ROUTED
            return Qwen3VLMoeConfig(vision_config=vision, text_config=text, **QWEN_IDS)
        case "qwen3_5":
            text = TEXT | LINEAR | {"head_dim": 8, "rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}
            return Qwen3_5Config(vision_config=QWEN3_VISION, text_config=text, **QWEN_IDS)


CLASSES = {
    "llava": LlavaForConditionalGeneration,
    "video_llava": VideoLlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
    "internvl": InternVLForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
    "qwen3_5": Qwen3_5ForConditionalGeneration,
}
QWEN = [family for family in CLASSES if family.startswith("qwen")]
WITH_VIDEO = [*QWEN, "video_llava", "llava_onevision", "internvl"]


def processor_of(family: str):
    square, edge = {"height": 56, "width": 56}, {"shortest_edge": 56}
    match family:
        case "llava":
            return CLIPImageProcessorPil(size=edge, crop_size=square)
        case "video_llava":
            return VideoLlavaImageProcessor(size=edge, crop_size=square)
        case "llava_next":
            return LlavaNextImageProcessorPil(size=edge, crop_size=square, image_grid_pinpoints=TILES)
        case "llava_onevision":
            return LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=TILES)
        case "internvl":
            return GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, max_patches=4)
        case _:
            return Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=160 * 160)


@lru_cache(maxsize=64)
def tiny(family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, **options) -> Adapter:
    """An adapter around random weights, large enough that every row of the input moves the output."""
    torch.manual_seed(0)
    config = config_of(family)
    config._attn_implementation = attn
    model = CLASSES[family]._from_config(config, attn_implementation=attn).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or "newline" in name:
                weight.normal_(0, 0.25)
            elif "bias" in name:
                weight.normal_(0, 0.1)
    written = {"internvl": INTERN_TEMPLATE}.get(family, QWEN_TEMPLATE if family in QWEN else LLAVA_TEMPLATE)
    if family in QWEN:
        options = {"min_frame_pixels": 28 * 28, "max_frame_pixels": 90 * 90} | options
    return FAMILIES[family](model.to(dtype), tokenizer(written), processor_of(family), **options)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Random blocks of colour, so that resizing leaves something to see."""
    blocks = np.random.default_rng(seed).integers(0, 255, (max(1, height // 7), max(1, width // 7), 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def video(seed: int, n_frames: int, width: int = 84, height: int = 56, fps: float = 2.0) -> Video:
    return Video([picture(100 * seed + k, width, height) for k in range(n_frames)], fps=fps)


@cache
def prompts_of(family: str) -> tuple[Prompt, ...]:
    """Three prompts of different length: one picture, two of other sizes, and a picture with a video."""
    several = [picture(1, 112, 70), picture(2, 56, 140)]
    if family == "llava_onevision":
        several = several[:1]
    last = [picture(3, 90, 60)]
    if family == "llava_onevision":
        last = [video(4, 3)]
    elif family in WITH_VIDEO:
        last = [video(4, 3), *last]
    return (
        Prompt("What color is it ?", [picture(0, 84, 84)], sample="a"),
        Prompt("Which of the two is larger, the first or the second ?", several, sample="b"),
        Prompt("What happens then ?", last, sample="c"),
    )


def patches_of_video(frames: list[np.ndarray], patch: int = 14, merge: int = 2, steps: int = 2) -> list[list[float]]:
    """Rows of a Qwen-VL video from its normalised frames [3, height, width], by counting."""
    height, width = (side // patch for side in frames[0].shape[1:])
    rows = []
    for t in range(0, len(frames), steps):
        for block_y in range(0, height, merge):
            for block_x in range(0, width, merge):
                for y in range(block_y, block_y + merge):
                    for x in range(block_x, block_x + merge):
                        window = (slice(y * patch, (y + 1) * patch), slice(x * patch, (x + 1) * patch))
                        rows.append(np.stack([f[:, *window] for f in frames[t : t + steps]], 1).ravel())
    return rows


def qwen_frames(clip: Video, processor) -> tuple[list[np.ndarray], tuple[int, int]]:
    """Normalised frames [3, height, width], an even number of them, at the size that the processor gives a picture."""
    frames = list(clip.frames) + ([clip.frames[-1]] if len(clip.frames) % 2 else [])
    size = {"shortest_edge": 28 * 28, "longest_edge": 90 * 90}
    _, height, width = processor(images=frames[:1], size=size, return_tensors="np")["image_grid_thw"][0]
    resized = [f.resize((int(width) * 14, int(height) * 14), Image.Resampling.BICUBIC) for f in frames]
    return [normalised(f, processor) for f in resized], (int(height), int(width))


def normalised(image: Image.Image, processor) -> np.ndarray:
    """[3, height, width] float32, in the processor's order of rounding."""
    values = (np.asarray(image).transpose(2, 0, 1) * (1 / 255)).astype(np.float32)
    mean, std = (np.float32(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    return (values - mean) / std


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
    if clips and family in QWEN:
        read = [qwen_frames(clip, processor) for clip in clips]
        rows = [row for frames, _ in read for row in patches_of_video(frames)]
        inputs["pixel_values_videos"] = torch.tensor(np.array(rows), dtype=dtype)
        inputs["video_grid_thw"] = torch.tensor([[len(frames) // 2, *size] for frames, size in read])
        if family == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([2 / clip.fps for clip in clips])
    elif clips and family == "internvl":  # its pictures and videos are tiles of one tensor, in the order of the prompt
        tiles = []
        for one in [one for prompt in prompts for one in prompt.images]:
            is_video = isinstance(one, Video)
            frames = list(one.frames) if is_video else [one]
            tiles.append(processor(images=frames, crop_to_patches=not is_video, return_tensors="pt")["pixel_values"])
        inputs["pixel_values"] = torch.cat(tiles).to(dtype)
    elif clips and family == "llava_onevision":
        squeezed = [[frame.resize((56, 56), Image.Resampling.BICUBIC) for frame in clip.frames] for clip in clips]
        values = [[normalised(frame, processor) for frame in clip] for clip in squeezed]
        inputs["pixel_values_videos"] = torch.tensor(np.array(values), dtype=dtype)
    elif clips:
        values = [next(iter(processor(images=list(clip.frames), return_tensors="pt").values())) for clip in clips]
        inputs["pixel_values_videos"] = torch.stack(values).to(dtype)

    texts, seen = [], iter(range(len(images)))
    for prompt in prompts:
        content = ""
        for one in prompt.images:
            content += written(family, one, inputs, None if isinstance(one, Video) else next(seen))
        text = f"<|im_start|>user\n{content}{prompt.text}<|im_end|>\n<|im_start|>assistant\n"
        texts.append(words(text).input_ids)
    length = max(map(len, texts))
    inputs["input_ids"] = torch.tensor([[0] * (length - len(ids)) + ids for ids in texts])
    inputs["attention_mask"] = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in texts])
    if family in QWEN:
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = ((ids == 7).int() + 2 * (ids == 8).int()).int()
    return inputs


def written(family: str, one, inputs: dict, k: int | None) -> str:
    """What stands for one picture or video in the text; ``k`` counts pictures."""
    is_video = isinstance(one, Video)
    if family in QWEN and not is_video:
        n = int(inputs["image_grid_thw"][k].prod()) // 4
        return f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>"
    if family in QWEN:
        frames, (height, width) = qwen_frames(one, processor_of(family))
        n_steps, n = len(frames) // 2, height * width // 4
        if family.startswith("qwen2"):
            return f"<|vision_start|>{'<|video_pad|>' * (n * n_steps)}<|vision_end|>"
        times = [i / one.fps for i in range(len(one.frames))]
        times += times[-1:] * (len(times) % 2)
        return "".join(
            f"<{(times[2 * t] + times[2 * t + 1]) / 2:.1f} seconds><|vision_start|>{'<|video_pad|>' * n}<|vision_end|>"
            for t in range(n_steps)
        )
    if family == "internvl":
        if is_video:
            lines = [f"Frame{i + 1}: <img>{'<IMG_CONTEXT>' * 4}</img>" for i in range(len(one.frames))]
            return "\n".join(lines) + "\n"
        n_tiles = len(processor_of(family)(images=[one], return_tensors="pt")["pixel_values"])
        return f"<img>{'<IMG_CONTEXT>' * (4 * n_tiles)}</img>\n"
    if is_video:
        n = {"video_llava": 17, "llava_onevision": 4}[family] * len(one.frames) + (family == "llava_onevision")
        return "<video>" * n + "\n"
    n = 16
    if family in ("llava_next", "llava_onevision"):
        n = n_anyres(one.size, family)
    return "<image>" * n + "\n"


def canvas_of(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Rows and columns of patches on the canvas of a tiled picture, and lines of padding on each side of the two."""
    width, height = size

    def waste(canvas):  # the canvas that keeps most of the picture, then wastes least
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return (-kept, canvas[0] * canvas[1] - kept)

    rows, columns = (side // 14 for side in min(TILES, key=waste))
    if width / height > columns / rows:
        return rows, columns, (rows - int(round(height * columns / width, 7))) // 2, 0
    return rows, columns, 0, (columns - int(round(width * rows / height, 7))) // 2


def shrunk(rows: int, columns: int, family: str) -> tuple[int, int]:
    """LLaVA-OneVision scales what has more than two tiles' tokens down."""
    ratio = (rows * columns / (2 * 16)) ** 0.5
    if family == "llava_onevision" and ratio > 1.1:
        return int(rows // ratio), int(columns // ratio)
    return rows, columns


def n_anyres(size: tuple[int, int], family: str) -> int:
    """Tokens of a tiled picture: the small one, the crops without padding, a newline a line."""
    rows, columns, above, beside = canvas_of(size)
    rows, columns = shrunk(rows - 2 * above, columns - 2 * beside, family)
    return 16 + rows * columns + rows
