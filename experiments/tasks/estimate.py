"""Estimates the cost of a model and the savings of pruning: parameters, KV cache, FLOPs. Needs no weights and no GPU.

python run.py task=estimate model=qwen3vl_8b keep=0.25 n_visual=1024
"""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from experiments.flops import Decoder, architecture, build, vision_flops
from mipruner.errors import InputError
from mipruner.selection import budget


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    options = {key: config[key] for key in ("keep", "n_visual", "n_text", "dtype")}
    print(json.dumps(estimate(config["model"]["name"] or config["model"]["path"] or "any", **options), indent=1))


@cache
def n_parameters(model: str) -> int:
    """Number of weights of a model."""
    return sum(p.numel() for p in build(architecture(model), torch.bfloat16).parameters())


def estimate(
    model: str, keep: int | float, n_visual: int | None = None, n_text: int = 60, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Cost of one prompt with ``n_visual`` visual and ``n_text`` other tokens, with and without pruning.

    Raises
    ------
    InputError
        If the model's images have no fixed number of tokens and ``n_visual`` is not given. See also `architecture`.
    """
    config = architecture(model)
    n_visual = n_visual or getattr(config, "mm_tokens_per_image", None)
    if n_visual is None and config.model_type != "llava":
        raise InputError(f"{model} takes images of any size: say how many visual tokens, for example n_visual=1024")
    if n_visual is None:
        n_visual = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    decoder = Decoder.of(config.get_text_config())
    parameters = n_parameters(model)
    size = getattr(torch, dtype).itemsize
    n_keep = budget(keep, n_visual)
    lengths = {"full": n_text + n_visual, "pruned": n_text + n_keep}
    vision = vision_flops(config, n_visual)
    return {
        "model": model,
        "n_visual": n_visual,
        "n_keep": n_keep,
        "n_text": n_text,
        "parameters_billion": round(parameters / 1e9, 4),
        "weights_gib": round(parameters * size / 2**30, 3),
        "kv_cache_mib": {name: decoder.kv_cache_bytes(n, size) / 2**20 for name, n in lengths.items()},
        "prefill_tflop": {name: decoder.prefill_flops(n) / 1e12 for name, n in lengths.items()},
        "vision_tflop": None if vision is None else vision / 1e12,
    }
