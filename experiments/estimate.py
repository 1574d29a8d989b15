"""What a model costs, from its config alone: parameters, KV cache, and the FLOPs that pruning saves.

python -m experiments.efficiency estimate model=qwen3vl_8b keep=0.25 n_visual=1024 n_text=60

Needs neither weights nor a GPU nor a network: a model whose folder is not here is built on the meta device from
experiments/architectures.yaml. Multiply-adds count as two FLOPs, attention as the full square (kernels that skip the
causal half do less), in the way of torch's FlopCounterMode, which the tests compare with.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from experiments.results import ROOT
from mipruner.errors import InputError
from mipruner.selection import budget

ARCHITECTURES = Path(__file__).with_name("architectures.yaml")


def architecture(name: str) -> PreTrainedConfig:
    """The transformers config of a model by its name on the command line, or of a folder.

    Raises
    ------
    InputError
        If the name is neither a folder nor in architectures.yaml.
    """
    conf = ROOT / "conf/model" / f"{name}.yaml"
    path = ROOT / (yaml.safe_load(conf.read_text())["path"] if conf.exists() else name)
    if (path / "config.json").exists():
        return AutoConfig.from_pretrained(path)
    known = yaml.safe_load(ARCHITECTURES.read_text())
    if name not in known:
        raise InputError(f"there is no shape of {name!r}: give a folder with config.json, or {', '.join(known)}")
    return AutoConfig.for_model(**known[name])


def build(config: PreTrainedConfig, dtype: torch.dtype, device: str = "meta", **options: Any) -> PreTrainedModel:
    """The model of a config without its weights: nothing on the meta device, whatever lay in memory elsewhere."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, **options)
    return model.eval() if device == "meta" else model.to_empty(device=device).eval()


@dataclass(frozen=True)
class Decoder:
    """The numbers of a decoder-only transformer that its cost depends on, and the closed forms."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """FFN multiply-adds a token and layer: 3 d I, or for a mixture of experts k times that and the router's."""
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Decoder":
        """From a ``text_config``. Raises `InputError` if some layers are not full attention."""
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            raise InputError(f"the closed form is for full attention; {config.model_type!r} mixes in other layers")
        width = config.hidden_size
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
        )

    def prefill_flops(self, n: int) -> int:
        """FLOPs of n prompt tokens, with the head on the last one."""
        projections = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = 2 * n * (projections + self.ffn) + 4 * self.heads * self.head_dim * n**2
        return self.layers * layer + 2 * self.width * self.vocabulary

    def kv_cache_bytes(self, n: int, element_size: int) -> int:
        """Bytes that the keys and values of n tokens take."""
        return 2 * self.layers * self.kv_heads * self.head_dim * n * element_size


def vision_flops(config: PreTrainedConfig, n_visual: int) -> int | None:
    """FLOPs of vision encoder and projector for one picture of ``n_visual`` tokens; None for a family not listed."""
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


def estimate(
    model: str, keep: int | float, n_visual: int | None = None, n_text: int = 60, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """The cost of one prompt with ``n_visual`` visual and ``n_text`` other tokens, with and without pruning.

    Raises
    ------
    InputError
        If the model's pictures have no fixed number of tokens and ``n_visual`` is not given, and as `architecture`.
    """
    config = architecture(model)
    if n_visual is None and config.model_type != "llava":
        raise InputError(f"{model} takes pictures of any size: say how many visual tokens, for example n_visual=1024")
    if n_visual is None:
        n_visual = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    meta = build(config, getattr(torch, dtype))
    decoder = Decoder.of(config.get_text_config())
    parameters = sum(p.numel() for p in meta.parameters())
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
