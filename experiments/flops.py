"""Computes FLOPs and KV cache of a model from its config.

A multiply-add counts as two FLOPs, and attention as the full square (causal kernels compute less), as in torch's
FlopCounterMode. Tests compare with it.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from experiments.conf import names, read
from experiments.results import ROOT
from mipruner.errors import InputError


def architecture(name: str | None) -> PreTrainedConfig:
    """transformers config of a model, by its name on the command line, or of a folder.

    Raises
    ------
    InputError
        If the name is neither a folder nor a file in conf/model with a shape.
    """
    models = {known: read("model", known) for known in names("model")}
    options = models.get(name or "", {"path": name})
    path = ROOT / (options["path"] or name or "")
    if (path / "config.json").exists():
        return AutoConfig.from_pretrained(path)
    if "shape" not in options:
        known = ", ".join(known for known, options in models.items() if "shape" in options)
        raise InputError(f"there is no shape of {name!r}: give a folder with config.json, or {known}")
    return AutoConfig.for_model(**deepcopy(options["shape"]))


STAND_INS = {"llava": "experiments/demo/llava", "qwen3_vl": "experiments/demo/qwen3vl"}
"""Demo models whose tokenizer and image processor are used for random weights; costs do not depend on them."""


def stand_in(name: str) -> tuple[PreTrainedConfig, Path]:
    """Config of ``name`` with the special ids of a demo model, and the folder of that demo's tokenizer and processor.

    Raises
    ------
    InputError
        If there is no demo model of the family.
    """
    config = architecture(name)
    if config.model_type not in STAND_INS:
        raise InputError(f"random weights are for {', '.join(STAND_INS)} models, and {name} is a {config.model_type}")
    folder = ROOT / STAND_INS[config.model_type]
    for key, value in vars(AutoConfig.from_pretrained(folder)).items():
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            setattr(config, key, value)
    return config, folder


def build(config: PreTrainedConfig, dtype: torch.dtype, device: str = "meta", **options: Any) -> PreTrainedModel:
    """Model of a config without weights: on the meta device, or uninitialised memory on another device."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, **options)
    return model.eval() if device == "meta" else model.to_empty(device=device).eval()


@dataclass(frozen=True)
class Decoder:
    """Dimensions of a decoder-only transformer, and closed formulas of its cost."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """FFN multiply-adds per token and layer: 3 d I; for a mixture of experts, k times that plus the router."""
    vocabulary: int
    windows: int = 0
    """Layers with a sliding window, whose cache holds ``window`` tokens."""
    window: int = 0

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Decoder":
        """Read a ``text_config``. Raises `InputError` if some layers have neither full nor sliding attention."""
        kinds = list(getattr(config, "layer_types", None) or ())
        if set(kinds) - {"full_attention", "sliding_attention"}:
            raise InputError(
                f"the closed form is for full and sliding attention; {config.model_type!r} mixes in other layers"
            )
        windows, width = kinds.count("sliding_attention"), config.hidden_size
        if hasattr(config, "num_experts"):
            experts = config.num_experts_per_tok * 3 * width * config.moe_intermediate_size
            ffn = experts + width * config.num_experts
        else:
            ffn = 3 * width * config.intermediate_size
        return cls(
            layers=config.num_hidden_layers,
            width=width,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or width // config.num_attention_heads,
            ffn=ffn,
            vocabulary=config.vocab_size,
            windows=windows,
            window=config.sliding_window - 1 if windows else 0,
        )

    def prefill_flops(self, n: int) -> int:
        """FLOPs of n prompt tokens, with the head on the last token only."""
        projections = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = 2 * n * (projections + self.ffn) + 4 * self.heads * self.head_dim * n**2
        return self.layers * layer + 2 * self.width * self.vocabulary

    def kv_cache_bytes(self, n: int, element_size: int) -> int:
        """Bytes of the keys and values of n tokens."""
        tokens = (self.layers - self.windows) * n + self.windows * min(n, self.window)
        return 2 * tokens * self.kv_heads * self.head_dim * element_size


def vision_flops(config: PreTrainedConfig, n_visual: int) -> int | None:
    """FLOPs of vision encoder and projector for one image of ``n_visual`` tokens; None for other families."""
    vision, kind = config.vision_config, config.model_type
    if kind == "llava":
        n, d, width = (
            n_visual + (vision.model_type == "clip_vision_model"),
            vision.hidden_size,
            config.text_config.hidden_size,
        )
        layer = 2 * n * (4 * d**2 + 2 * d * vision.intermediate_size) + 4 * n**2 * d
        embedding = 2 * n_visual * 3 * vision.patch_size**2 * d
        return embedding + vision.num_hidden_layers * layer + 2 * n_visual * (d * width + width**2)
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
        merge = vision.spatial_merge_size**2
        n, patch = merge * n_visual, 3 * vision.temporal_patch_size * vision.patch_size**2
        if kind == "qwen2_vl":
            d, out, ffn = vision.embed_dim, vision.hidden_size, 2 * vision.mlp_ratio * vision.embed_dim
        else:
            d, out = vision.hidden_size, vision.out_hidden_size
            ffn = (3 if kind == "qwen2_5_vl" else 2) * vision.intermediate_size
        seen = [n] * vision.depth
        if kind == "qwen2_5_vl":
            window = min(n, (vision.window_size // vision.patch_size) ** 2)
            seen = [n if k in vision.fullatt_block_indexes else window for k in range(vision.depth)]
        mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
        blocks = sum(2 * n * (4 * d**2 + ffn * d) + 4 * n * keys * d for keys in seen)
        return 2 * n * patch * d + blocks + mergers * 2 * n_visual * (merge * d) * (merge * d + out)
    return None
