"""What `tiny.shrink` cannot guess, and pixel inputs."""

import copy
import inspect

import torch

from any_tiny import IMAGE, VOCAB, D

TEXT = dict(hidden_size=D)
SIGLIP = dict(
    model_type="siglip_vision_model",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
    vision_use_head=False,
)
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
GEMMA4 = {
    "text_config": {
        **SLIDING,
        "global_head_dim": 16,
        "use_bidirectional_attention": "vision",
        "per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}},
    },
    "vision_config": dict(
        model_type="gemma4_vision",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        patch_size=14,
        pooling_kernel_size=2,
        position_embedding_size=64,
    ),
}
TILES = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
OVERRIDES_VOCAB = {
    "chameleon": {
        "vocabulary_map": {
            "<image>": IMAGE,
            **{f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 100 + i for i in range(64)},
        },
        "vq_config": {
            "resolution": 32,
            "num_embeddings": 64,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "embed_dim": 32,
            "latent_channels": 32,
        },
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": IMAGE,
            "<|extra_200|>": 40,
            **{f"<|visual token {i:06d}|>": 100 + i for i in range(64)},
        },
        "vq_config": {
            "codebook_size": 64,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "embed_dim": 4,
            "hidden_size": 64,
            "num_attention_heads": 1,
        },
    },
}
OVERRIDES = {
    "aria": {"projector_patch_to_query_dict": {16: 8}, "max_value_projector_patch_to_query_dict": 8},
    "gemma4": GEMMA4,
    "gemma4:causal": {
        **GEMMA4,
        "text_config": {**GEMMA4["text_config"], "use_bidirectional_attention": None, "num_kv_shared_layers": 2},
    },
    "gemma3": {"mm_tokens_per_image": 16, "vision_config": {"image_size": 112}, "text_config": SLIDING},
    "shieldgemma2": {"mm_tokens_per_image": 16, "vision_config": {"image_size": 112}, "text_config": SLIDING},
    "gemma3n": {
        "text_config": {
            **SLIDING,
            "intermediate_size": 96,
            "num_kv_shared_layers": 2,
            "vocab_size": VOCAB,
            "vocab_size_per_layer_input": 496,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
        "vision_config": {"hidden_size": 64, "vocab_offset": 496, "vocab_size": 8},
        "vision_soft_tokens_per_image": 16,
        "audio_config": {
            "vocab_offset": 504,
            "vocab_size": 8,
            "hidden_size": 64,
            "conf_num_attention_heads": 4,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 4],
        },
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {"mrope_section": [3, 3, 2], "rope_type": "default", "rope_theta": 10000.0},
            "moe_intermediate_size": [32, 16],
        }
    },
    "janus": {
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_embeddings": 64,
            "image_token_embed_dim": 64,
            "num_patches": 4,
        }
    },
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 64}}, "vision_use_cls_token": False},
    "fast_vlm": {"vision_config": {"hidden_size": 64}},
    "deepseek_vl_hybrid": {"high_res_vision_config": {"window_size": 2}},
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]},
        }
    },
    "minimax_m3_vl": {"merged_hidden_size": 4 * D},
    "granite4_vision": {
        "text_config": {"model_type": "granite4_vision_text"},
        "vision_config": {"model_type": "clip_vision_model"},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-2, 0], [-1, 1]],
        "spatial_target_layers": [0, 1, 2, 3],
        **TILES,
        "qformer_config": {"cross_attention_frequency": 1, "num_hidden_layers": 1},
    },
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [2, 1], "num_key_value_heads": 4},
        "vision_config": {"image_size": [56, 56], "num_position_embeddings": 16, "num_key_value_heads": 4},
        "image_patch_id": IMAGE,
        "text_config": {"rope_scaling_layers": [0, 1, 2, 3]},
    },
    **{m: {"text_config": MROPE} for m in ("glm46v", "glm4v", "glm_ocr", "glmga", "qwen2_vl", "qwen2_5_vl")},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            }
        }
    },
    "qwen2_5_omni_thinker": {"text_config": MROPE, "vision_start_token_id": 490, "audio_start_token_id": 491},
    "qwen3_omni_moe_thinker": {"text_config": MROPE, "vision_start_token_id": 490, "audio_start_token_id": 491},
    "paddleocr_vl": {"text_config": MROPE},
    "pp_chart2table": {"vision_config": {"image_size": 224, "patch_size": 14, "window_size": 2, "output_channels": 32}},
    "got_ocr2": {"vision_config": {"image_size": 224, "patch_size": 14, "window_size": 2, "output_channels": 32}},
    **{m: TILES for m in ("llava_next", "llava_next_video", "llava_onevision")},
    "llama4": {
        "vision_config": {
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
            "intermediate_size": 256,
            "pixel_shuffle_ratio": 0.5,
        },
        "text_config": {
            "layer_types": ["chunked_attention", "chunked_attention", "chunked_attention", "full_attention"],
            "no_rope_layers": [1, 1, 1, 0],
        },
    },
    "vipllava": {"vision_feature_layer": [-2, -3, -4], "vision_feature_layers": [-2, -3, -4]},
    **{m: {"image_token_id": IMAGE, "video_token_id": 501} for m in ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")},
    **{m: {**OVERRIDES_VOCAB[m], "image_token_id": IMAGE} for m in ("chameleon", "emu3")},
    "kimi_k25": {"text_config": {"num_key_value_heads": 4}},
    "fuyu": {"patch_size": 14, "image_token_id": IMAGE},
    "blip-2": {"image_token_id": IMAGE, "image_token_index": IMAGE, "text_config": {"ffn_dim": 96, "hidden_size": 64}},
    "step3p7": {"vision_config": {"image_size": 224}, "text_config": {"sliding_window": 12}},
    "paligemma:2": {"text_config": {"model_type": "gemma2", **SLIDING}},
    "mistral3:sliding": {"text_config": {"sliding_window": 12}},
    "idefics3:wide": {"scale_factor": 2},
    "cohere_compass": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "rope_parameters": {
                k: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
                for k in ("sliding_attention", "full_attention")
            },
        }
    },
    "lfm2_vl:conv": {
        "text_config": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4, "full_attn_idxs": None}
    },
    "mistral_large4:wide": None,
    "glm5_next:wide": None,
    "muse_glimmer": {
        "text_config": {"layer_rope_theta": [1e4, 1e4, 1e4, 0]},
        "vision_config": {"num_hidden_layers": 4},
        "out_hidden_size": 256,
        "projector_hidden_size": 64,
    },
    "mistral_large4": {
        "text_config": {
            "kv_source_layers": [0, 1, 2, 3],
            "num_key_value_heads": 4,
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "indexer_types": ["full"] * 4,
            "no_rope_layers": [1, 1, 1, 0],
            "head_dim": 16,
        }
    },
    "glm5_next": {
        "text_config": {
            "num_key_value_heads": 4,
            "indexer_types": ["full"] * 4,
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "index_kpool": 4,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "qk_head_dim": 16,
            "hc_mult": 2,
        },
        "projection_intermediate_size": 96,
        "vision_config": {"projection_intermediate_size": 96},
    },
    "qwen4_exp": {
        "text_config": {
            **MROPE,
            "ple_layer_ids": [1],
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "number_of_conv_states": 3,
            "ple_embed_dim": 32,
            "ngram_vocab_size_base": 64,
            "eos_token_id": 2,
            "heads_per_ngram": 2,
            "hc_lowrank": 8,
            "hc_count": 2,
            "make_ngram_vocab_size_divisible_by": 4,
            "split_ngram_parts": 2,
            "linear_key_head_dim": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 256,
            "indexer_compress_ratio": 4,
        }
    },
    "diffusion_gemma": {
        "text_config": {**SLIDING, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        "vision_config": GEMMA4["vision_config"],
    },
    **{
        m: {
            "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2},
            "vision_config": {
                "sam_config": {
                    "downsample_channels": [32, 64],
                    "output_channels": 32,
                    "image_size": 64,
                    "patch_size": 8,
                    "window_size": 2,
                    "global_attn_indexes": [1, 3],
                }
            },
        }
        for m in ("deepseek_ocr2", "unlimited_ocr")
    },
    "dots3_note": {
        "text_config": {
            "num_key_value_heads": 4,
            "layer_types": ["indexed_attention", "sliding_attention"] * 2,
            "index_topk": 256,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "head_dim": 32,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "per_layer_config": {k: {"qk_nope_head_dim": 16} for k in (1, 3)},
            "shared_experts_intermediate_size": 32,
        },
        "vision_config": {
            "mlp_layer_types": ["dense"] * 4,
            "per_layer_config": {},
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
        },
        "audio_config": {
            "downsample_hidden_size": 16,
            "adapter_input_size": 64,
            "adapter_out_dim": 64,
            "num_key_value_heads": 4,
        },
    },
    "step3p7:sliding": {
        "vision_config": {"image_size": 224},
        "text_config": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2},
    },
    "inkling2": {
        "text_config": {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": 12,
            "unpadded_vocab_size": 505,
            "n_layers_per_attn_res_block": 2,
            "d_rel": 4,
            "rel_extent": 64,
        },
        "vision_config": {"projection_hidden_dim": 96, "posemb_grid_size": 8},
    },
    "gemma4_unified": {
        "text_config": GEMMA4["text_config"],
        "vision_config": dict(
            model_type="gemma4_unified_vision",
            patch_size=14,
            pooling_kernel_size=1,
            mm_embed_dim=64,
            mm_posemb_size=16,
            output_proj_dims=64,
        ),
    },
    "muse_spark": {
        "text_config": {"layer_rope_theta": [1e4, 1e4, 1e4, 0], "moe_hidden_size": 32},
        "vision_config": {"num_hidden_layers": 4},
        "out_hidden_size": 256,
        "projector_hidden_size": 64,
        "audio_config": {"out_hidden_size": 64, "hidden_sizes": [16] * 4, "depths": [1] * 4},
    },
    "inkling_mm_model": {
        "text_config": {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": 12,
            "unpadded_vocab_size": 505,
            "d_rel": 4,
            "rel_extent": 64,
        },
        "vision_config": {"n_layers": 2},
    },
}


for m in ("mistral_large4", "glm5_next"):
    OVERRIDES[m + ":wide"] = copy.deepcopy(OVERRIDES[m])
    OVERRIDES[m + ":wide"]["text_config"]["index_topk"] = 256
OVERRIDES["idefics3"] = OVERRIDES["smolvlm"] = {"scale_factor": 2}


def img(n=2, side=56, c=3):
    return torch.randn(n, c, side, side, generator=torch.Generator().manual_seed(7))


def patches(config, grid=((1, 4, 8), (1, 6, 4)), **more):
    v = config.vision_config
    c = getattr(v, "in_channels", None) or getattr(v, "num_channels", 3)
    t = getattr(v, "temporal_patch_size", 1) or 1
    n = sum(a * b * d for a, b, d in grid)
    width = c * t * v.patch_size**2
    return {
        "pixel_values": torch.randn(n, width, generator=torch.Generator().manual_seed(7)),
        "image_grid_thw": torch.tensor(grid),
        **more,
    }


def pixels(mt, model, owner):
    """Arguments of the model that carry two images."""

    config = model.config
    params = inspect.signature(owner.get_image_features).parameters
    special = SPECIAL.get(mt.split(":")[0])
    if special:
        return special(config)
    if "image_grid_thw" in params:
        return patches(config)
    side = getattr(config.vision_config, "image_size", 56) if hasattr(config, "vision_config") else 56
    side = side[0] if isinstance(side, list | tuple) else side
    out = {"pixel_values": img(side=side)}
    if "image_sizes" in params and mt.split(":")[0] not in ("llava", "vipllava"):
        out["image_sizes"] = torch.tensor([[side, side]] * 2)
    return out


def muse(c):
    grid = ((1, 4, 8), (1, 6, 4))
    v = c.vision_config
    return {
        "pixel_values": torch.randn(
            56, 3 * v.patch_temporal * v.patch_size**2, generator=torch.Generator().manual_seed(7)
        ),
        "image_grid_thw": torch.tensor(grid),
    }


def tiles(c):
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes = [[112, 112], [56, 112]]
    n = [image_size_to_num_patches(s, c.image_grid_pinpoints, c.vision_config.image_size) for s in sizes]
    x = torch.randn(
        2, max(n), 3, c.vision_config.image_size, c.vision_config.image_size, generator=torch.Generator().manual_seed(7)
    )
    return {"pixel_values": x, "image_sizes": torch.tensor(sizes)}


def gem4(c):
    xy = (
        torch.stack(torch.meshgrid(torch.arange(6), torch.arange(4), indexing="xy"), -1)
        .reshape(1, -1, 2)
        .repeat(2, 1, 1)
    )
    return {
        "pixel_values": torch.rand(2, 24, 3 * 14 * 14, generator=torch.Generator().manual_seed(7)),
        "image_position_ids": xy,
    }


def cube(c, extra):
    p = patches(c)
    v = c.vision_config
    x = p["pixel_values"].reshape(-1, 3, v.patch_size, v.patch_size)
    return {"pixel_values": x[None] if extra else x, "image_grid_thw": p["image_grid_thw"]}


def molmo(c):
    pool = torch.arange(16).reshape(4, 4)
    pool = torch.stack([torch.tensor([0, 1, 4, 5]) + 2 * (i % 2) + 8 * (i // 2) for i in range(4)])
    both = torch.cat([pool, pool + 16])
    return {
        "pixel_values": torch.randn(2, 16, 588, generator=torch.Generator().manual_seed(7)),
        "image_token_pooling": both,
        "image_grids": torch.tensor([[2, 2, 0, 0], [2, 2, 0, 0]]),
        "image_num_crops": torch.tensor([1, 1]),
    }


def inkling2(c):
    v = c.vision_config
    side, draw = v.patch_size * v.spatial_merge_size, torch.Generator().manual_seed(7)
    return {
        "pixel_values": torch.randn(14, side, side, 3, generator=draw),
        "image_grid_thw": torch.tensor([[1, 2, 4], [1, 3, 2]]),
    }


def minicpm(c):
    v = c.vision_config
    x = torch.randn(1, 3, v.patch_size, v.patch_size * 96, generator=torch.Generator().manual_seed(7))
    return {"pixel_values": x, "target_sizes": torch.tensor([[4, 8], [8, 8]], dtype=torch.int32)}


def locals_of(side):
    """Two images as a whole, one of them also in two tiles."""
    return {
        "pixel_values": img(side=side),
        "pixel_values_local": img(side=side),
        "num_local_patches": torch.tensor([0, 2]),
    }


SPECIAL = {
    "deepseek_ocr2": lambda c: locals_of(56),
    "idefics2": lambda c: {"pixel_values": img()[None]},
    "idefics3": lambda c: {"pixel_values": img()[None]},
    "smolvlm": lambda c: {"pixel_values": img()[None]},
    "perception_lm": lambda c: {"pixel_values": img()[:, None]},
    "lfm2_vl": lambda c: {
        "pixel_values": torch.randn(2, 16, 3 * 14 * 14, generator=torch.Generator().manual_seed(7)),
        "spatial_shapes": torch.tensor([[4, 4], [2, 6]]),
        "pixel_attention_mask": torch.tensor([[1] * 16, [1] * 12 + [0] * 4]),
    },
    "video_llama_3": lambda c: patches(c, image_merge_sizes=torch.tensor([2, 2])),
    "llava_next": tiles,
    "llava_next_video": tiles,
    "llava_onevision": tiles,
    "granite4_vision": tiles,
    "gemma4": gem4,
    "gemma4_unified": gem4,
    "kimi_k25": lambda c: cube(c, False),
    "paddleocr_vl": lambda c: cube(c, False),
    "deepseek_vl_hybrid": lambda c: {
        "pixel_values": img(),
        "high_res_pixel_values": img(side=c.high_res_vision_config.image_size),
    },
    "molmo2": molmo,
    "minicpmv4_6": minicpm,
    "minicpmv4_7": minicpm,
    "minicpm_ocr": minicpm,
    "step3p7": lambda c: locals_of(c.vision_config.image_size),
    "fast_vlm": lambda c: {"pixel_values": img()},
    "gemma3n": lambda c: {"pixel_values": img()},
    "chameleon": lambda c: {"pixel_values": img(side=32)},
    "emu3": lambda c: {"pixel_values": img(side=32), "image_sizes": torch.tensor([[32, 32]] * 2)},
    "muse_glimmer": muse,
    "inkling2": inkling2,
    "inkling_mm_model": lambda c: {
        "pixel_values": torch.randn(14, 2, 14, 14, 3, generator=torch.Generator().manual_seed(7))
    },
    "muse_spark": muse,
    "fuyu": lambda c: {"pixel_values": torch.randn(1, 16, 588, generator=torch.Generator().manual_seed(7))},
    "granite_docling": lambda c: {
        "pixel_values": img()[None],
        "pixel_attention_mask": torch.ones(1, 2, dtype=torch.bool),
    },
}
