"""A tiny random model of any image-text-to-text model type, from nothing but its configuration class.

`shrink` walks the nested default configuration and replaces numbers by name; `OVERRIDES` holds what cannot be guessed.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

VOCAB = 512
IMAGE = 500
D = 64
SIZES = dict(
    hidden_size=D,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    global_head_dim=16,
    num_global_key_value_heads=2,
    vocab_size=VOCAB,
    image_size=56,
    patch_size=14,
    num_heads=4,
    depth=4,
    out_hidden_size=D,
    embed_dim=D,
    hidden_dim=D,
    d_model=D,
    mlp_dim=96,
    ffn_dim=96,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
    attention_heads=4,
    max_position_embeddings=1024,
    moe_intermediate_size=32,
    num_local_experts=4,
    num_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_topk=2,
    moe_k=2,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    moe_num_shared_experts=1,
    shared_expert_intermediate_size=32,
    first_k_dense_replace=1,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    qk_head_dim=32,
    v_head_dim=16,
    sliding_window=12,
    projection_dim=D,
    projector_hidden_size=D,
    text_hidden_size=D,
    num_position_embeddings=256,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    spatial_merge_size=2,
    max_window_layers=4,
    vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=8,
    vision_output_dim=D,
    encoder_hidden_size=D,
    alignment_intermediate_size=96,
    output_dim=D,
    position_embedding_size=64,
    num_image_tokens=16,
    image_seq_length=16,
    intermediate_size_mlp=96,
    attention_chunk_size=16,
    projector_input_dim=D,
    projector_output_dim=D,
    fullatt_block_indexes=[1, 3],
    deepstack_visual_indexes=[0, 1, 2],
    window_size=56,
    num_hidden_layers_=4,
    audio_config=None,
    resampler_n_latents=8,
    resampler_depth=2,
    resampler_n_heads=4,
    resampler_head_dim=16,
    num_query_tokens=8,
    word_embed_proj_dim=D,
    num_kv_shared_layers=0,
    laurel_rank=8,
    query_pre_attn_scalar=16,
    pos_emb_height=16,
    pos_emb_width=16,
    pos_emb_time=4,
    layers=2,
    num_layers=4,
    projection_hidden_size=D,
)
DROP = (
    "layer_types",
    "moe_layers",
    "no_rope_layers",
    "full_attn_idxs",
    "mlp_layer_types",
    "_name_or_path",
    "dtype",
    "transformers_version",
    "architectures",
    "max_length",
    "per_layer_config",
    "activation_sparsity_pattern",
)
TOKENS = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": 501,
    "video_token_index": 501,
    "audio_token_id": 502,
    "audio_token_index": 502,
}


def shrink(d, top=True):
    out = {}
    kinds = d.get("layer_types")
    for k, v in d.items():
        if not isinstance(k, str):
            out[k] = v
            continue
        if k in DROP:
            continue
        if k == "audio_config" and v is not None and d.get("model_type") in ("gemma3n", "gemma4", "gemma4_unified"):
            out[k] = shrink(v, False) if d["model_type"] == "gemma3n" else None
        elif isinstance(v, dict) and k in ("rope_parameters", "rope_scaling"):
            out[k] = rope(v)
        elif isinstance(v, dict):
            out[k] = shrink(v, False)
        elif k in TOKENS and v is not None:
            out[k] = TOKENS[k]
        elif k.endswith(("_token_id", "_token_index")) and isinstance(v, int) and v >= VOCAB - 12:
            out[k] = 480 + sum(map(ord, k)) % 19
        elif k in ("eos_token_id", "pad_token_id", "bos_token_id", "forced_eos_token_id") and isinstance(v, list):
            out[k] = 2
        elif k in SIZES and v is not None and not (isinstance(v, bool)):
            out[k] = SIZES[k] if not isinstance(v, list) or isinstance(SIZES[k], list) else [SIZES[k]] * len(v)
        else:
            out[k] = v
    if kinds and len(set(kinds)) > 1:
        seen = sorted(set(kinds), key=lambda x: x == "full_attention")
        out["layer_types"] = (seen * 4)[: 4 if len(seen) < 4 else len(seen)]
        out["num_hidden_layers"] = len(out["layer_types"])
    elif kinds:
        out["layer_types"] = list(kinds[:1]) * 4
    return out


def rope(r):
    out = {k: rope(v) if isinstance(v, dict) else v for k, v in r.items()}
    if "mrope_section" in out:
        out["mrope_section"] = [4, 2, 2]
    return out


def merge(d, extra):
    for k, v in extra.items():
        if isinstance(v, dict) and isinstance(d.get(k), dict):
            merge(d[k], v)
        else:
            d[k] = v
    return d


def config_of(mt, overrides):
    default = CONFIG_MAPPING[mt.split(":")[0]]()
    d = merge(shrink(default.to_dict()), overrides.get(mt, {}))
    return type(default).from_dict(d)


class Tower(torch.nn.Module):
    """Stands for a timm tower, which needs torchvision."""

    def __init__(self, config):
        super().__init__()
        self.flat = config.model_type == "timm_wrapper" and "embed_dim" in (config.model_args or {})
        self.conv = torch.nn.Conv2d(3, D, 14, 14)

    def forward(self, pixel_values, **kwargs):
        x = self.conv(pixel_values)
        return transformers.modeling_outputs.BaseModelOutputWithPooling(
            last_hidden_state=x.flatten(2).mT if self.flat else x
        )


@contextmanager
def towers():
    """Towers of timm are stood in for while a model is built."""
    stock = transformers.AutoModel.from_config

    def from_config(config, **kwargs):
        return Tower(config) if config.model_type in ("timm_wrapper", "gemma3n_vision") else stock(config, **kwargs)

    with patch.object(transformers.AutoModel, "from_config", from_config):
        yield


def build(mt, overrides, limit=40e6):
    """A tiny random model of type ``mt`` (or ``type:variant``) in float32.

    Raises
    ------
    RuntimeError
        If the shrunk configuration still makes more than ``limit`` parameters.
    """
    with towers():
        return _build(mt, overrides, limit)


def _build(mt, overrides, limit):
    cfg = config_of(mt, overrides)
    cls = getattr(transformers, CLASSES[mt.split(":")[0]])
    with torch.device("meta"):
        n = sum(p.numel() for p in cls._from_config(cfg).parameters())
    if n > limit:
        raise RuntimeError(f"{n / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    cfg._attn_implementation = "sdpa"
    model = cls._from_config(config_of(mt, overrides), dtype=torch.float32).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a spread that makes logits differ
        for p in model.parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.08, generator=g)
            elif float(p.abs().sum()) == 0:
                p.normal_(0, 0.02, generator=g)
        try:
            emb = model.get_input_embeddings()
        except NotImplementedError:  # of an encoder-decoder
            return model
        emb.weight.normal_(0, 1.0 / float(getattr(emb, "embed_scale", 1.0)), generator=g)
    return model
