"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: grids of any size, time and plane, frames with their times in words."""

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from families import TEXT, normalize, sum_received, template
from mipruner.models import Video

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
IDS = dict(image_token_id=7, video_token_id=8, vision_start_token_id=5, vision_end_token_id=6)
VISION = dict(depth=4, hidden_size=32, num_heads=2, patch_size=14)
VISION2 = VISION | dict(embed_dim=32, mlp_ratio=2)
VISION25 = VISION | dict(
    out_hidden_size=32, intermediate_size=48, window_size=56, fullatt_block_indexes=[1, 2], tokens_per_second=2
)
VISION3 = VISION | dict(intermediate_size=48, out_hidden_size=32, num_position_embeddings=16)
DEEPSTACK = VISION3 | {"deepstack_visual_indexes": [0, 1, 2]}
TEXT2 = TEXT | {"rope_parameters": MROPE}
TEXT3 = TEXT | {"head_dim": 8, "rope_parameters": MROPE | {"mrope_interleaved": True}}
ROUTED = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LINEAR = dict(
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
    head_dim=8,
    rope_parameters=MROPE | {"partial_rotary_factor": 1.0},
)
CONFIGS = {
    "qwen2_vl": dict(vision_config=VISION2, text_config=TEXT2, **IDS),
    "qwen2_5_vl": dict(vision_config=VISION25, text_config=TEXT2, **IDS),
    "qwen3_vl": dict(vision_config=DEEPSTACK, text_config=TEXT3, **IDS),
    "qwen3_vl_moe": dict(vision_config=DEEPSTACK, text_config=TEXT3 | ROUTED, **IDS),
    "qwen3_5": dict(vision_config=VISION3, text_config=TEXT | LINEAR, **IDS),
}
TEMPLATE = template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
OPTIONS = {"min_frame_pixels": 28 * 28, "max_frame_pixels": 90 * 90}


def make_processor(family):
    return Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=160 * 160)


def make_patches(frames: list[np.ndarray], patch: int = 14, merge: int = 2, steps: int = 2) -> list[list[float]]:
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


def make_frames(clip: Video, processor) -> tuple[list[np.ndarray], tuple[int, int]]:
    """Normalised frames [3, height, width], an even number of them, at the size that the processor gives an image."""
    frames = list(clip.frames) + ([clip.frames[-1]] if len(clip.frames) % 2 else [])
    size = {"shortest_edge": 28 * 28, "longest_edge": 90 * 90}
    _, height, width = processor(images=frames[:1], size=size, return_tensors="np")["image_grid_thw"][0]
    resized = [f.resize((int(width) * 14, int(height) * 14), Image.Resampling.BICUBIC) for f in frames]
    return [normalize(f, processor) for f in resized], (int(height), int(width))


def make_videos(family, clips, prompts, dtype):
    read = [make_frames(clip, make_processor(family)) for clip in clips]
    rows = [row for frames, _ in read for row in make_patches(frames)]
    inputs = {"pixel_values_videos": torch.tensor(np.array(rows), dtype=dtype)}
    inputs["video_grid_thw"] = torch.tensor([[len(frames) // 2, *size] for frames, size in read])
    if family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([2 / clip.fps for clip in clips])
    return inputs


def write(family, one, inputs, k):
    if not isinstance(one, Video):
        n = int(inputs["image_grid_thw"][k].prod()) // 4
        return f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>"
    frames, (height, width) = make_frames(one, make_processor(family))
    n_steps, n = len(frames) // 2, height * width // 4
    if family.startswith("qwen2"):
        return f"<|vision_start|>{'<|video_pad|>' * (n * n_steps)}<|vision_end|>"
    times = [i / one.fps for i in range(len(one.frames))]
    times += times[-1:] * (len(times) % 2)
    return "".join(
        f"<{(times[2 * t] + times[2 * t + 1]) / 2:.1f} seconds><|vision_start|>{'<|video_pad|>' * n}<|vision_end|>"
        for t in range(n_steps)
    )


def find_attention(family, eager, one, pixels, recorded):
    t, h, w = pixels["grid_thw"][0].tolist()
    block = 2 if hasattr(eager.vision, "window_size") else 3
    chunks = [weights[0] for module, weights in recorded if module is eager.vision.blocks[block].attn]
    assert [chunk.shape[-1] for chunk in chunks] == [h * w] * t  # each step of a video by itself
    patches = [value for chunk in chunks for value in sum_received(chunk)]
    tokens = [sum(patches[4 * j : 4 * j + 4]) / 4 for j in range(t * h * w // 4)]
    if block == 3:
        return tokens
    raster, k = [0.0] * len(tokens), 0  # windows of 2 x 2 tokens, row by row
    for frame in range(t):
        for top in range(0, h // 2, 2):
            for left in range(0, w // 2, 2):
                for y in range(top, min(top + 2, h // 2)):
                    for x in range(left, min(left + 2, w // 2)):
                        raster[(frame * (h // 2) + y) * (w // 2) + x] = tokens[k]
                        k += 1
    return raster
