"""Initialises the demo Qwen3-VL from the demo LLaVA, so that two CPU cores can train it.

Common weights are copied. Where the architectures differ, the copy approximates the original:

- an image is repeated as two frames, so each gets half of the patch convolution;
- CLIP's first layer norm is folded into patch and position weights: centring and gain exactly, the division by the
  standard deviation of a token as its mean over tokens;
- Qwen's vision encoder has rotary positions, CLIP has none: within each head the basis of queries and keys is rotated
  so that the strongest directions are in the slowest rotary pairs (orthogonal, so attention without positions is
  unchanged);
- Qwen's decoder normalises queries and keys: the gain is set to their mean norm in the original.

Merger and deepstack have no counterpart and are random.
"""

from typing import Any

import torch
from torch import Tensor

from experiments.demo.families import Llava
from mipruner.intercept import captured


@torch.no_grad()
def warm_start(student: Any, teacher: Any, pixels: Tensor, ids: Tensor) -> None:
    """Overwrite the weights of the student. The student's vocabulary must begin with that of the teacher.

    Parameters
    ----------
    student : Qwen3VLForConditionalGeneration
    teacher : LlavaForConditionalGeneration
        With the same widths, heads and layers, except CLIP's last layer, whose output LLaVA does not read.
    pixels : Tensor [B, 3, height, width]
        Normalised images for measuring norms and directions.
    ids : Tensor [B, n_ids]
        Token ids of their turns.
    """
    eyes, decoder = teacher.model.vision_tower, teacher.model.language_model
    family = Llava(teacher)
    projections = {
        f"{name} {index} {side}": layer.self_attn.get_submodule(f"{side}_proj")
        for name, layers in (("vision", eyes.encoder.layers), ("decoder", decoder.layers))
        for index, layer in enumerate(layers)
        for side in "qk"
    }
    with captured(*projections.values()) as calls:
        visual = family.see(pixels)
        every = torch.arange(visual.tokens.shape[1], device=ids.device).expand(len(ids), -1)
        family.read(visual, every, ids)
    outputs = {name: call.output for name, call in zip(projections, calls, strict=True)}

    copy_patches(student.model.visual, eyes, pixels)
    for index, (block, layer) in enumerate(zip(student.model.visual.blocks, eyes.encoder.layers, strict=False)):
        queries, keys = (outputs[f"vision {index} {side}"][:, 1:] for side in "qk")
        turn = slow_basis(queries, keys, block.attn.num_heads)
        attention = layer.self_attn
        turned = [turn @ proj.weight for proj in (attention.q_proj, attention.k_proj)]
        turned_bias = [turn @ proj.bias for proj in (attention.q_proj, attention.k_proj)]
        block.attn.qkv.weight.copy_(torch.cat([*turned, attention.v_proj.weight]))
        block.attn.qkv.bias.copy_(torch.cat([*turned_bias, attention.v_proj.bias]))
        block.attn.proj.load_state_dict(attention.out_proj.state_dict())
        block.norm1.load_state_dict(layer.layer_norm1.state_dict())
        block.norm2.load_state_dict(layer.layer_norm2.state_dict())
        block.mlp.linear_fc1.load_state_dict(layer.mlp.fc1.state_dict())
        block.mlp.linear_fc2.load_state_dict(layer.mlp.fc2.state_dict())

    words = decoder.get_input_embeddings().weight
    embeddings = student.get_input_embeddings().weight
    embeddings.copy_(words.mean(0).expand_as(embeddings))
    embeddings[: len(words)] = words
    source = decoder.state_dict()
    for name, parameter in student.model.language_model.named_parameters():
        if name in source and parameter is not embeddings:
            parameter.copy_(source[name])
    for index, layer in enumerate(student.model.language_model.layers):
        for side, norm in (("q", layer.self_attn.q_norm), ("k", layer.self_attn.k_norm)):
            heads = outputs[f"decoder {index} {side}"].unflatten(-1, (-1, norm.weight.numel()))
            norm.weight.fill_(heads.pow(2).mean(-1).sqrt().mean())


def copy_patches(vision: Any, eyes: Any, pixels: Tensor) -> None:
    """Copy patch and position embeddings with CLIP's first layer norm folded in."""
    norm, kernel = eyes.pre_layrnorm, eyes.embeddings.patch_embedding.weight
    positions = eyes.embeddings.position_embedding.weight[1:]
    tokens = eyes.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + positions
    gain = norm.weight * (tokens.var(-1, unbiased=False) + norm.eps).rsqrt().mean()
    folded = (kernel - kernel.mean(0)) * gain[:, None, None, None]
    frames = vision.patch_embed.proj.weight.shape[2]
    vision.patch_embed.proj.weight.copy_(folded[:, :, None].expand(-1, -1, frames, -1, -1) / frames)
    vision.patch_embed.proj.bias.copy_(norm.bias)
    vision.pos_embed.weight.copy_((positions - positions.mean(-1, keepdim=True)) * gain)


def slow_basis(queries: Tensor, keys: Tensor, n_heads: int) -> Tensor:
    """Block-diagonal orthogonal matrix [d, d] that puts each head's strongest directions into the slowest rotary pairs.

    Queries and keys are [.., d]. Half of a head's pairs rotate with the row and half with the column, dimension i with
    i + head size / 2. Within each half, later pairs rotate more slowly.
    """
    both = torch.cat([queries.flatten(0, -2), keys.flatten(0, -2)]).unflatten(-1, (n_heads, -1))
    size = both.shape[-1]
    _, directions = torch.linalg.eigh(torch.einsum("nhi,nhj->hij", both, both))  # weakest first
    pairs = [axis * size // 4 + rank for rank in range(size // 4) for axis in (0, 1)]  # fastest first
    slots = [dimension for pair in pairs for dimension in (pair, pair + size // 2)]
    turns = torch.zeros_like(directions)
    turns[:, slots] = directions.transpose(1, 2)
    return torch.block_diag(*turns)
