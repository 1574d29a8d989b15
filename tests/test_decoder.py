"""Shortening inside the decoder against a recomputation that removes no row and caches nothing.

Every step runs the whole prompt again; rows that were dropped are masked out, and merged rows overwrite a dropped one.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel, StaticCache
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextConfig, Qwen2VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextModel

from mipruner.errors import InputError
from mipruner.intercept import Stepped
from mipruner.pruners import AutoPruner, DARTPruner, FastVPruner, SparseVLMPruner
from mipruner.pruners.base import DecoderPruner, Reduction
from mipruner.shortening import shorten

D, N_LAYERS, N_NEW = 32, 5, 2
SIZES = dict(
    hidden_size=D,
    intermediate_size=48,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=40,
    max_position_embeddings=256,
)
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def build(family: str, implementation: str = "sdpa"):
    torch.manual_seed(0)
    if family == "llama":
        config, cls = LlamaConfig(**SIZES), LlamaModel
    elif family == "qwen2_vl":
        config, cls = Qwen2VLTextConfig(**SIZES, rope_parameters=MROPE), Qwen2VLTextModel
    else:
        config, cls = Qwen3VLTextConfig(**SIZES, head_dim=8, rope_parameters=MROPE), Qwen3VLTextModel
    config._attn_implementation = implementation
    model = cls(config).eval()
    for parameter in model.parameters():  # large enough for attention to be far from uniform
        nn.init.normal_(parameter, std=0.35) if parameter.ndim > 1 else None
    return model


@dataclass
class Prompt:
    """Text, n_visual visual tokens, text; positions [3, S] as M-RoPE has them, or [1, S]."""

    n_visual: int
    n_before: int
    n_after: int
    mrope: bool
    n_deepstack: int = 0
    embeds: torch.Tensor = field(init=False)
    visual: torch.Tensor = field(init=False)
    positions: torch.Tensor = field(init=False)
    deepstack: list = field(init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.n_visual)
        n = self.n_before + self.n_visual + self.n_after
        self.embeds = torch.randn(n, D, generator=generator)
        self.visual = torch.tensor([self.n_before <= i < self.n_before + self.n_visual for i in range(n)])
        self.positions = torch.arange(n)[None]
        if self.mrope:
            t = torch.arange(self.n_visual)
            grid = self.n_before + torch.stack([0 * t, t // 4, t % 4])
            before = torch.arange(self.n_before).expand(3, -1)
            after = grid.max() + 1 + torch.arange(self.n_after).expand(3, -1)
            self.positions = torch.cat([before, grid, after], 1)
        self.deepstack = [torch.randn(self.n_visual, D, generator=generator) for _ in range(self.n_deepstack)]


@dataclass(frozen=True)
class Scripted(DecoderPruner):
    """Keeps a random third at each stage and merges the others into two rows; writes down what it did."""

    at: tuple[int, ...] = (2,)
    merges: bool = False
    log: dict = field(default_factory=dict)

    def stages(self, n_visual, n_keep, n_layers):
        return dict.fromkeys(self.at, n_keep)

    def reduce(self, view, n_keep):
        generator = torch.Generator().manual_seed(view.n_start + view.layer)
        order, n = torch.randperm(view.n_visual, generator=generator), view.n_visual // 3
        reduction = Reduction(order[:n].sort().values)
        if self.merges:
            weights = torch.rand(2, view.n_visual, generator=generator)
            reduction = Reduction(reduction.indices, weights / weights.sum(1, keepdim=True), order[n : n + 2])
        self.log.setdefault(view.n_start, {})[view.layer] = reduction
        return reduction


@dataclass(frozen=True)
class Renumbering(Scripted):
    renumbers = True


@torch.no_grad()
def recompute(model, prompt, script, new, renumbers):
    """Last hidden state of prompt + new token embeddings [t, d], masked, at full length, without cache."""
    hidden = torch.cat([prompt.embeds, new])
    n, n_new = len(prompt.embeds), len(new)
    following = prompt.positions[:, -1:] + 1 + torch.arange(n_new)
    positions = torch.cat([prompt.positions, following], 1)
    alive, order = torch.ones(n + n_new, dtype=torch.bool), [float(i) for i in range(n + n_new)]
    visual = torch.cat([prompt.visual, torch.zeros(n_new, dtype=torch.bool)])
    deepstack = [torch.zeros(n + n_new, D).index_add(0, visual.nonzero()[:, 0], rows) for rows in prompt.deepstack]
    for k, layer in enumerate(model.layers):
        if k in script:
            step = script[k]
            rows = sorted((visual & alive).nonzero()[:, 0].tolist(), key=order.__getitem__)
            kept, last, merged = {rows[i] for i in step.indices.tolist()}, order[rows[-1]], {}
            for m, centre in enumerate([] if step.merge is None else step.centres.tolist()):
                merged[rows[centre]] = [x.clone() for x in (step.merge[m] @ hidden[rows],)] + [
                    step.merge[m] @ x[rows] for x in deepstack
                ]
                order[rows[centre]] = last + (m + 1) / 8
            for i, (content, *extra) in merged.items():
                hidden[i] = content
                for x, value in zip(deepstack, extra, strict=True):
                    x[i] = value
            for i in rows:
                alive[i] = i in kept or i in merged
            if renumbers:
                ranks = sorted(alive.nonzero()[:, 0].tolist(), key=order.__getitem__)
                for rank, i in enumerate(ranks):
                    positions[:, i] = rank
        when = torch.tensor(order)
        allowed = alive[None, :] & (when[None, :] <= when[:, None]) | torch.eye(n + n_new, dtype=torch.bool)
        mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
        ids = positions[:, None] if len(positions) == 3 else positions
        embeddings = model.rotary_emb(hidden[None], ids)
        hidden = layer(hidden[None], attention_mask=mask, position_embeddings=embeddings)[0]
        if k < len(deepstack):
            hidden = hidden + torch.where((visual & alive)[:, None], deepstack[k], 0)
    return model.norm(hidden)[-1]


def batch(prompts):
    """Keyword arguments of the prefill, padded on the left, and is_visual."""
    n = max(len(p.embeds) for p in prompts)
    embeds, mask = torch.zeros(len(prompts), n, D), torch.zeros(len(prompts), n, dtype=torch.long)
    positions, visual = (
        torch.zeros(3, len(prompts), n, dtype=torch.long),
        torch.zeros(len(prompts), n, dtype=torch.bool),
    )
    for b, p in enumerate(prompts):
        start = n - len(p.embeds)
        embeds[b, start:], mask[b, start:], visual[b, start:] = p.embeds, 1, p.visual
        positions[:, b, start:] = p.positions
    inputs = {
        "inputs_embeds": embeds,
        "attention_mask": mask if (mask == 0).any() else None,
        "position_ids": positions if prompts[0].mrope else positions[0],
    }
    if prompts[0].deepstack:
        rows = [torch.cat(layer) for layer in zip(*(p.deepstack for p in prompts), strict=True)]
        inputs |= {"visual_pos_masks": visual, "deepstack_visual_embeds": rows}
    return inputs, visual


@torch.no_grad()
def decode(model, inputs, new):
    """Last hidden states [t + 1, B, d] of a prefill and one cached step for each of the embeddings ``new`` [t, d]."""
    inputs = dict(inputs)
    cache = DynamicCache(config=model.config)
    states = [model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]]
    positions, mask = inputs["position_ids"][..., -1:], inputs["attention_mask"]
    for row in new:
        positions = positions + 1
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(
            inputs_embeds=row.expand(len(states[0]), 1, -1),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        states.append(out.last_hidden_state[:, -1])
    return torch.stack(states), cache


def prompts_of(family, n):
    mrope, n_deepstack = family != "llama", 3 if family == "qwen3_vl" else 0
    return [Prompt(*sizes, mrope, n_deepstack) for sizes in [(24, 3, 5), (18, 2, 4), (30, 4, 9)][:n]]


def hook_count(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks + sum(isinstance(m, Stepped) for m in model.modules())


@pytest.mark.parametrize(("at", "merges"), [((2,), False), ((1, 2, 4), True)])
@pytest.mark.parametrize(("implementation", "n_prompts"), [("sdpa", 1), ("sdpa", 3), ("eager", 1), ("eager", 3)])
@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", Scripted), ("llama", Renumbering), ("qwen2_vl", Renumbering), ("qwen3_vl", Scripted)],
)
def test_shortened_is_masked(family, implementation, n_prompts, at, merges, method):
    model, prompts = build(family, implementation), prompts_of(family, n_prompts)
    pruner = method(at=at, merges=merges)
    inputs, visual = batch(prompts)
    new = torch.randn(N_NEW, D, generator=torch.Generator().manual_seed(1))
    before = hook_count(model)
    with shorten(model, pruner, visual, [4] * n_prompts) as run:
        states, cache = decode(model, inputs, new)
    assert hook_count(model) == before
    for b, prompt in enumerate(prompts):
        script = pruner.log[prompt.n_visual]
        for t in (0, N_NEW):
            expected = recompute(model, prompt, script, new[:t], method.renumbers and family == "llama")
            torch.testing.assert_close(states[t, b], expected, atol=2e-4, rtol=1e-4)
        counts, n = [], prompt.n_visual
        for k in range(N_LAYERS):
            n = script[k].n_rows if k in script else n
            counts.append(n)
        assert run.per_layer[b] == counts
        assert len(run.kept[b]) == counts[-1] - (script[at[-1]].n_rows - len(script[at[-1]].indices)) or merges
    if n_prompts == 1:
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        assert lengths == [prompt.n_before + c + prompt.n_after + N_NEW for c in run.per_layer[0]]


def test_kept_names_the_tokens_that_reach_the_last_layer():
    model, (prompt,) = build("llama"), prompts_of("llama", 1)
    pruner = Scripted(at=(1, 3))
    inputs, visual = batch([prompt])
    with shorten(model, pruner, visual, [4]) as run:
        decode(model, inputs, [])
    first, second = (pruner.log[prompt.n_visual][k].indices for k in (1, 3))
    assert run.kept[0].tolist() == first[second].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("n_prompts", [1, 3])
def test_keep_all_is_the_untouched_model(family, n_prompts):
    model, prompts = build(family), prompts_of(family, n_prompts)
    inputs, visual = batch(prompts)
    new = torch.randn(2, D)
    expected, _ = decode(model, inputs, new)
    with shorten(model, FastVPruner(layer=1), visual, [p.n_visual for p in prompts]) as run:
        states, _ = decode(model, inputs, new)
    assert torch.equal(states, expected)
    assert run.per_layer == [[p.n_visual] * N_LAYERS for p in prompts]


@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "qwen3_vl"])
def test_attention_is_that_of_the_layer_before(family):
    """Against the weights that eager attention returns, padding included."""
    model, prompts = build(family, "eager"), prompts_of(family, 3)
    seen = {}

    class Reader(FastVPruner):
        def reduce(self, view, n_keep):
            rows = torch.tensor([1, view.n_visual, len(view.visual) - 1])
            seen[view.n_start] = view.attention(rows), view.keys
            return super().reduce(view, n_keep)

    inputs, visual = batch(prompts)
    with shorten(model, Reader(layer=3), visual, [4] * 3):
        _, cache = decode(model, inputs, [])
    weights = []
    handle = model.layers[2].self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    decode(model, inputs, [])
    handle.remove()
    for b, prompt in enumerate(prompts):
        start = weights[0].shape[-1] - len(prompt.embeds)
        attention, keys = seen[prompt.n_visual]
        for r, row in enumerate([1, prompt.n_visual, len(prompt.embeds) - 1]):
            torch.testing.assert_close(attention[:, r], weights[0][b, :, start + row, start:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(keys, cache.layers[2].keys[b, :, start:].transpose(0, 1), atol=1e-5, rtol=1e-4)


METHODS = [FastVPruner(), DARTPruner(), DARTPruner(exact=True), SparseVLMPruner(), AutoPruner(), FastVPruner(layer=4)]


@pytest.mark.parametrize("pruner", METHODS, ids=lambda p: f"{type(p).__name__}-{getattr(p, 'layer', '')}")
@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "qwen3_vl"])
def test_a_prompt_in_a_padded_batch_is_the_prompt_alone(family, pruner):
    model, prompts = build(family), prompts_of(family, 3)
    new = torch.randn(2, D, generator=torch.Generator().manual_seed(1))
    attention = [torch.rand(p.n_visual, generator=torch.Generator().manual_seed(p.n_visual)) for p in prompts]
    inputs, visual = batch(prompts)
    with shorten(model, pruner, visual, [8, 18, 11], attention) as run:
        states, _ = decode(model, inputs, new)
    for b, (prompt, n) in enumerate(zip(prompts, [8, 18, 11], strict=True)):
        inputs, visual = batch([prompt])
        with shorten(model, pruner, visual, [n], attention[b : b + 1]) as alone:
            expected, _ = decode(model, inputs, new)
        torch.testing.assert_close(states[:, b], expected[:, 0], atol=1e-4, rtol=1e-4)
        assert run.per_layer[b] == alone.per_layer[0]
        assert run.kept[b].tolist() == alone.kept[0].tolist()
        if not isinstance(pruner, AutoPruner):
            assert run.per_layer[b] == pruner.entering(prompt.n_visual, n, N_LAYERS)


def test_generate_goes_through_the_same_hooks():
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    (prompt,) = prompts_of("llama", 1)
    inputs, visual = batch([prompt])
    with shorten(model.model, FastVPruner(layer=1), visual, [3]) as run:
        out = model.generate(inputs_embeds=inputs["inputs_embeds"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert run.per_layer == [[24, 3, 3, 3, 3]]
    script, tokens = {1: Reduction(run.kept[0])}, []
    for _ in range(4):
        new = model.model.embed_tokens(torch.tensor(tokens, dtype=torch.long))
        tokens.append(int(model.lm_head(recompute(model.model, prompt, script, new, False)).argmax()))
    assert out[0].tolist() == tokens


def test_hooks_go_whatever_is_raised():
    model, prompts = build("qwen3_vl"), prompts_of("qwen3_vl", 1)
    inputs, visual = batch(prompts)

    class Broken(FastVPruner):
        def reduce(self, view, n_keep):
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"), shorten(model, Broken(), visual, [4]):
        decode(model, inputs, [])
    assert hook_count(model) == 0


def test_what_cannot_be_shortened_is_refused():
    model, prompts = build("llama"), prompts_of("llama", 1)
    inputs, visual = batch(prompts)
    with pytest.raises(InputError, match="DynamicCache"), shorten(model, FastVPruner(), visual, [4]):
        model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=64), use_cache=True)
    with pytest.raises(InputError, match="decoder of 5"), shorten(model, FastVPruner(layer=9), visual, [4]):
        pass
    with pytest.raises(InputError, match="is not of this prompt"), shorten(model, FastVPruner(), visual[:, 1:], [4]):
        decode(model, inputs, [])
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match="use sdpa"), shorten(model, FastVPruner(), visual, [4]):
        pass
    assert hook_count(model) == 0
