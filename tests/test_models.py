"""Adapters against the untouched models they wrap.

What "the model" would do comes from `tiny.py` and from `generate`, never from an adapter. Tolerances are on logits of
standard deviation 1.4; two ways of computing that differ in the order of their sums agree to 5e-5 in float32.
"""

import json
import re
import time
from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AttentionInterface, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mipruner import PRUNERS
from mipruner.decoding import Decoding, inverse, prefill, step
from mipruner.errors import InputError, ModelError
from mipruner.intercept import Stepped
from mipruner.models import FAMILIES, PROMPTS, Prompt, Video, load
from mipruner.models.llava import LlavaAdapter, covered
from mipruner.pipeline import Pipeline
from mipruner.prompt import Batch, Visual, collate
from mipruner.pruners import ImagePruner, NoPruner, Pruner, RandomPruner
from mipruner.selection import Selection
from tiny import (
    MODULES,
    QWEN,
    WITH_VIDEO,
    make_image,
    prompts_of,
    reference,
    tiny,
    tokenizer,
    video,
)

FLOAT32 = 5e-5
BFLOAT16 = 0.15
FAMILY = pytest.mark.parametrize("family", MODULES)
ATTN = pytest.mark.parametrize("attn", ["sdpa", "eager"])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def encode(adapter, prompts, pruner=None):
    """Full prompts, one `Encoded` each."""
    pruner = pruner or NoPruner()
    seen = Pipeline(adapter, pruner, 1.0).see([image for prompt in prompts for image in prompt.images])
    return [adapter.read(p, [seen[id(image)] for image in p.images], pruner.signals) for p in prompts]


def thin(encoded, share=0.5, seed=0):
    """A random part of each image's tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Selection(torch.randperm(v.n_visual, generator=generator)[: max(1, int(share * v.n_visual))].sort().values)
        for v in encoded.visuals
    ]


def logits_of(adapter, batch: Batch, tokens) -> list[torch.Tensor]:
    """Logits [B, vocabulary] of each step, the tokens [B, T] being forced."""
    state = prefill(adapter, batch)
    found = [state.logits.clone()]
    for k in range(tokens.shape[1] - 1):
        state = step(adapter, state, tokens[:, k : k + 1])
        found.append(state.logits.clone())
    return found


def untouched(adapter, inputs, n=5):
    """New tokens [B, n] and their logits by `generate`."""
    out = adapter.model.generate(
        **inputs,
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, -n:], out.logits


def kept_mask(adapter, encoded, selections) -> torch.Tensor:
    """[S] bool over the full prompt: False for candidates that were not selected."""
    kept = torch.ones(len(encoded.ids), dtype=torch.bool)
    for slot, selection in zip(encoded.slots, selections, strict=True):
        chosen = set(selection.indices.tolist())
        for k, place in enumerate(slot.tolist()):
            kept[place] = k in chosen
    return kept


def test_every_family_has_a_tiny_configuration():
    assert set(MODULES) == set(FAMILIES), "write tests/families/<family>.py"


# Invariant 1: keep everything, and it is the untouched model, bit for bit.


@FAMILY
@ATTN
@pytest.mark.parametrize("group", [[0], [1], [2], [0, 1, 2]], ids=["one", "two", "mixed", "padded"])
def test_keeping_everything_is_the_untouched_model(family, attn, group):
    adapter, prompts = tiny(family, attn), [prompts_of(family)[k] for k in group]
    inputs = reference(family, prompts)
    tokens, expected = untouched(adapter, inputs)
    encoded = encode(adapter, prompts)
    for sample, ids, mask in zip(encoded, inputs["input_ids"], inputs["attention_mask"], strict=True):
        assert sample.ids.tolist() == ids[mask.bool()].tolist()
    batch = collate([adapter.shorten(sample, thin(sample, 1.0)) for sample in encoded])
    for ours, theirs in zip(logits_of(adapter, batch, tokens), expected, strict=True):
        assert torch.equal(ours, theirs.float())


@FAMILY
@pytest.mark.parametrize("name", [name for name, cls in PRUNERS.items() if issubclass(cls, Pruner)])
def test_every_pruner_keeps_everything_alike(family, name):
    """What reaches the language model is the same whatever the pruner reads on the way."""
    adapter, prompts, pruner = tiny(family), prompts_of(family), PRUNERS[name]()
    pipeline = Pipeline(adapter, pruner, 1.0)
    plain = collate([adapter.shorten(sample, thin(sample, 1.0)) for sample in encode(adapter, prompts)])
    samples = encode(adapter, prompts, pruner)
    batch = collate([adapter.shorten(sample, pipeline.select(sample)) for sample in samples])
    assert torch.equal(batch.embeds, plain.embeds)
    assert torch.equal(batch.position_ids, plain.position_ids)
    assert all(torch.equal(a, b) for a, b in zip(batch.deepstack, plain.deepstack, strict=True))


@FAMILY
def test_keeping_everything_in_bfloat16(family):
    adapter, prompts = tiny(family, dtype=torch.bfloat16), prompts_of(family)[:1]
    tokens, expected = untouched(adapter, reference(family, prompts, torch.bfloat16))
    batch = collate([adapter.shorten(sample, thin(sample, 1.0)) for sample in encode(adapter, prompts)])
    for ours, theirs in zip(logits_of(adapter, batch, tokens), expected, strict=True):
        assert torch.equal(ours, theirs.float())


@FAMILY
@pytest.mark.parametrize("name", PRUNERS)
def test_answers_of_a_batch(family, name):
    """The pipeline as a user calls it: each prompt answered, its budget met, rows that are never pruned on top."""
    adapter, prompts = tiny(family), prompts_of(family)
    pruner = PRUNERS[name](**({"keep_before": 0.5} if name == "mi_fastv" else {}))
    if isinstance(pruner, ImagePruner):
        pytest.skip("makes images smaller, see test_smaller")
    fixed = [sample.n_fixed for sample in encode(adapter, prompts)]
    everything = Pipeline(adapter, pruner, 1.0, Decoding(max_new_tokens=4))(prompts)
    plain = Pipeline(adapter, NoPruner(), 1.0, Decoding(max_new_tokens=4))(prompts)
    assert [answer.tokens for answer in everything] == [answer.tokens for answer in plain]
    few = Pipeline(adapter, pruner, 0.2, Decoding(max_new_tokens=1))
    if "grid" in pruner.needs and any(visual.grid is None for s in encode(adapter, prompts) for visual in s.visuals):
        with pytest.raises(InputError, match="needs grid"):
            few(prompts)
        return
    for answer, n_fixed in zip(few(prompts), fixed, strict=True):
        total, layers = sum(answer.n_visual), answer.visual_tokens_per_layer
        if isinstance(pruner, Pruner):
            expected = total if name == "none" else max(1, round(0.2 * total))
            assert layers == [answer.n_keep + n_fixed] * 4
            assert answer.n_keep == expected or (pruner.at_most and 1 <= answer.n_keep < expected)
        else:
            entering = pruner.n_entering(total, max(1, round(0.2 * total)))
            assert layers[0] == entering + n_fixed > layers[-1] and layers == sorted(layers, reverse=True)
        for selection, n in zip(answer.selections, answer.n_visual, strict=True):
            indices = selection.indices.tolist()
            assert indices == sorted(set(indices))
            assert all(0 <= index < n for index in indices)


# Invariant 2: pruned is the short sequence, with cache or without, alone or in a batch.


@pytest.mark.parametrize("family", [family for family in MODULES if family != "qwen3_5"])
@ATTN
def test_pruned_is_the_full_prompt_with_the_dropped_tokens_masked(family, attn):
    """Positions kept: the untouched model, its own positions, and a mask that hides what was dropped.

    Not for Qwen3.5, whose linear-attention state decays over hidden tokens too.
    """
    adapter = tiny(family, attn, positions="keep")
    for prompt in prompts_of(family):
        (sample,) = encode(adapter, [prompt])
        selections = thin(sample)
        state = prefill(adapter, collate([adapter.shorten(sample, selections)]))
        inputs = reference(family, [prompt])
        kept = kept_mask(adapter, sample, selections)
        if family in QWEN:
            grids = {name: inputs[name] for name in inputs if name.endswith("grid_thw") or name.startswith("second")}
            planes, _ = adapter.model.model.get_rope_index(
                inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], **grids
            )
        else:
            planes = torch.arange(len(kept))[None]
        expected = adapter.model(**inputs | {"attention_mask": kept[None].long()}, position_ids=planes).logits[:, -1]
        assert (state.logits - expected).abs().max() < FLOAT32


@FAMILY
@ATTN
@pytest.mark.parametrize("positions", ["keep", "repack"])
def test_cached_decoding_is_recomputation(family, attn, positions):
    """Step by step with the cache, against one forward over the short sequence and its answer."""
    if positions == "repack" and family in QWEN:
        with pytest.raises(InputError, match="repack"):
            tiny(family, attn, positions="repack")
        return
    adapter = tiny(family, attn, positions=positions)
    tokens = torch.tensor([[40, 77, 33, 90]])
    for prompt in prompts_of(family)[1:]:
        (sample,) = encode(adapter, [prompt])
        selections = thin(sample, seed=1)
        cached = logits_of(adapter, collate([adapter.shorten(sample, selections)]), tokens)

        kept = kept_mask(adapter, sample, selections)
        answer = adapter.model.get_input_embeddings()(tokens[0, :-1])
        embeds = torch.cat([torch.stack([e for e, k in zip(sample.embeds, kept, strict=True) if k]), answer])
        columns = [p.tolist() for p, k in zip(sample.position_ids.T, kept, strict=True) if k]
        if positions == "repack":
            columns = [[k] for k in range(len(columns))]
        for _ in range(3):
            columns.append([p + 1 for p in columns[-1]])
        rows = torch.tensor(columns).T[:, None]
        inputs = {"position_ids": rows[0] if len(rows) == 1 else rows}
        if sample.visuals[0].deepstack:
            inputs["visual_pos_masks"] = torch.zeros(1, len(embeds), dtype=torch.bool)
            inputs["visual_pos_masks"][0, : int(kept.sum())] = torch.isin(sample.ids, torch.tensor([7, 8]))[kept]
            inputs["deepstack_visual_embeds"] = [
                torch.cat([layers[level][s.indices] for layers, s in zip(deep, selections, strict=True)])
                for deep in [[v.deepstack for v in sample.visuals]]
                for level in range(3)
            ]
        out = adapter.language_model(
            inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds)).long(), use_cache=False, **inputs
        )
        full = adapter.model.lm_head(out.last_hidden_state[0, -4:])
        for k, ours in enumerate(cached):
            assert (ours[0] - full[k]).abs().max() < FLOAT32


@FAMILY
@ATTN
def test_a_sample_in_a_padded_batch_is_the_sample_alone(family, attn):
    adapter, prompts = tiny(family, attn), prompts_of(family)
    samples = encode(adapter, prompts)
    shorts = [
        adapter.shorten(sample, thin(sample, share)) for sample, share in zip(samples, (0.3, 0.5, 0.25), strict=True)
    ]
    tokens = torch.tensor([[40, 77, 33, 90]] * 3)
    together = logits_of(adapter, collate(shorts), tokens)
    assert len({len(short.embeds) for short in shorts}) == 3
    for row, short in enumerate(shorts):
        for ours, alone in zip(together, logits_of(adapter, collate([short]), tokens[:1]), strict=True):
            assert (ours[row] - alone[0]).abs().max() < FLOAT32


@FAMILY
def test_pruned_in_bfloat16_is_close_to_float32(family):
    prompt = prompts_of(family)[1]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        adapter = tiny(family, dtype=dtype)
        (sample,) = encode(adapter, [prompt])
        found.append(prefill(adapter, collate([adapter.shorten(sample, thin(sample))])).logits)
    error = (found[0] - found[1]).abs()
    assert error.mean() < BFLOAT16


def test_images_seen_together_are_images_seen_alone():
    """One vision pass over images and videos of many sizes mixes nothing up."""
    for family in MODULES:
        adapter = tiny(family)
        images = list({id(i): i for p in prompts_of(family) for i in p.images}.values())
        signals = frozenset({"attention", "attention_to_self", "hidden", "keys"})
        together = adapter.encode([adapter.preprocess(image) for image in images], signals)
        for image, ours in zip(images, together, strict=True):
            (alone,) = adapter.encode([adapter.preprocess(image)], signals)
            assert ours.grid == alone.grid and ours.times == alone.times
            torch.testing.assert_close(ours.rows, alone.rows, atol=1e-4, rtol=1e-4)
            assert ours.signals.keys() == alone.signals.keys()
            for name in alone.signals:
                assert len(ours.signals[name]) == ours.n_visual
                torch.testing.assert_close(ours.signals[name], alone.signals[name], atol=1e-4, rtol=1e-4)


# What each family can get wrong without an error.


@FAMILY
def test_hooks_are_gone_after_an_exception(family, monkeypatch):
    adapter = tiny(family)

    def n_hooks():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules())
        return hooks + sum(isinstance(m, Stepped) for m in adapter.model.modules())

    def broken(*args, **kwargs):
        counts.append(n_hooks())
        raise RuntimeError("in the vision tower")

    pixels = [adapter.preprocess(prompts_of(family)[0].images[0])]
    adapter.encode(pixels, frozenset({"attention"}))
    counts = [n_hooks()]
    module = adapter.vision.merger if family in QWEN else adapter.model.model.multi_modal_projector
    monkeypatch.setattr(module, "forward", broken)
    with pytest.raises(RuntimeError, match="in the vision tower"):
        adapter.encode(pixels, frozenset({"attention"}))
    counts.append(n_hooks())
    assert counts[0] == counts[2] < counts[1]


@FAMILY
def test_a_pipeline_given_another_pruner_sees_again_what_lacks_its_signals_and_only_that(family, monkeypatch):
    adapter = tiny(family)
    calls, encode = [], adapter.encode
    monkeypatch.setattr(adapter, "encode", lambda pixels, signals: calls.append(signals) or encode(pixels, signals))
    prompts, decoding = prompts_of(family)[:1], Decoding(max_new_tokens=4)
    pipeline = Pipeline(adapter, RandomPruner(), 0.5, decoding)
    for name, n_passes in {"random": 1, "mi": 0, "attention": 1, "vispruner": 1, "mi_attention": 0}.items():
        pipeline.pruner, n_before = PRUNERS[name](), len(calls)
        (answer,) = pipeline(prompts)
        assert len(calls) - n_before == n_passes, name
        (alone,) = Pipeline(adapter, PRUNERS[name](), 0.5, decoding)(prompts)
        assert answer.tokens == alone.tokens
        assert all(a.indices.equal(b.indices) for a, b in zip(answer.selections, alone.selections, strict=True))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_the_output_depends_on_deepstack_rows_at_their_tokens(family):
    adapter, prompt = tiny(family), prompts_of(family)[2]
    (sample,) = encode(adapter, [prompt])
    short = adapter.shorten(sample, thin(sample))
    assert len(short.deepstack) == 3
    assert all(len(layer) == int(short.is_visual.sum()) for layer in short.deepstack)
    right = prefill(adapter, collate([short])).logits
    for wrong in (
        replace(short, deepstack=()),
        replace(short, deepstack=tuple(layer.roll(1, 0) for layer in short.deepstack)),
        replace(short, deepstack=short.deepstack[::-1]),
    ):
        assert (prefill(adapter, collate([wrong])).logits - right).abs().max() > 0.1


@pytest.mark.parametrize("family", QWEN)
def test_positions_in_time_and_plane(family):
    """M-RoPE by counting, for two images and a video; and a short prompt keeps its part of them."""
    adapter = tiny(family)
    clip = video(9, 4, fps=1.0)
    (sample,) = encode(adapter, [Prompt("What is it ?", [make_image(1, 112, 70), clip, make_image(2, 56, 140)])])
    grids = iter([v.grid if v.is_video else (1, *v.grid) for v in sample.visuals])
    per_step = {"qwen2_vl": 1, "qwen2_5_vl": 2 * 2}.get(family)  # tokens a second x seconds a step
    expected, now, k, ids = [], 0, 0, sample.ids.tolist()
    while k < len(ids):
        if ids[k] not in (7, 8):
            expected.append((now, now, now))
            now, k = now + 1, k + 1
            continue
        t, h, w = next(grids)
        if per_step is None and t > 1:  # a step at a time, between the words that say when
            grids, t = iter([(1, h, w)] * (t - 1) + list(grids)), 1
        expected += [
            (now + i * (per_step or 0), now + y, now + x) for i in range(t) for y in range(h) for x in range(w)
        ]
        now, k = now + max(h, w), k + t * h * w
    assert sample.position_ids[1:].T.tolist() == [list(p) for p in expected]
    assert sample.position_ids[0].tolist() == list(range(len(ids)))
    selections = thin(sample)
    kept = kept_mask(adapter, sample, selections)
    assert torch.equal(adapter.shorten(sample, selections).position_ids, sample.position_ids[:, kept])


@pytest.mark.parametrize("family", QWEN)
def test_rope_deltas_left_by_another_call_change_nothing(family):
    adapter = tiny(family)
    pipeline = Pipeline(adapter, RandomPruner(), 0.5, Decoding(max_new_tokens=6))
    expected = pipeline(prompts_of(family))
    adapter.model.model.rope_deltas = torch.tensor([[-1000]])
    assert [a.tokens for a in pipeline(prompts_of(family))] == [a.tokens for a in expected]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5"])
def test_times_of_frames_are_text_that_is_neither_pruned_nor_asked(family):
    adapter = tiny(family)
    prompt = Prompt("What happens ?", [video(5, 5, fps=1.0)])
    (sample,) = encode(adapter, [prompt])
    words = tokenizer().decode(sample.ids[sample.is_text])
    assert words == "What happens ?"
    short = adapter.shorten(sample, [Selection(torch.tensor([0]))])
    every_text = [k for k in sample.ids.tolist() if k not in (7, 8)]
    assert len(short.embeds) == len(every_text) + 1
    stamps = re.findall(r"<[\d.]+ seconds>", tokenizer().decode(every_text))
    assert stamps == ["<0.5 seconds>", "<2.5 seconds>", "<4.0 seconds>"]
    assert sample.ids.tolist().count(5) == sample.ids.tolist().count(6) == 3  # no nested <|vision_start|>


def test_a_frame_of_video_llava_keeps_its_cls():
    adapter = tiny("video_llava")
    (sample,) = encode(adapter, [Prompt("What happens ?", [video(4, 3)])])
    (visual,) = sample.visuals
    assert visual.grid == (3, 4, 4) and visual.n_visual == 48 and len(visual.rows) == 51
    places = (sample.ids == 4).nonzero()[:, 0].tolist()
    cls = [place for k, place in enumerate(places) if k % 17 == 0]
    assert not set(cls) & set(sample.slots[0].tolist())
    raw = adapter.model.model.get_video_features(
        reference("video_llava", [Prompt("What happens ?", [video(4, 3)])])["pixel_values_videos"]
    ).pooler_output
    short = adapter.shorten(sample, [Selection(torch.tensor([5]))])
    rows = [k for k, row in enumerate(short.embeds) if any(torch.equal(row, other) for other in raw[:, 0])]
    assert len(rows) == 3
    assert torch.equal(short.embeds[rows], raw[:, 0])
    assert torch.equal(visual.tokens, raw[:, 1:].flatten(0, 1))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newlines_are_no_candidates(family):
    adapter = tiny(family)
    newline = adapter.model.model.image_newline
    for prompt in prompts_of(family):
        for visual in encode(adapter, [prompt])[0].visuals:
            is_newline = (visual.rows == newline).all(-1)
            assert is_newline.any()
            assert torch.equal(visual.is_candidate, ~is_newline)


def test_videos_of_one_call_of_llava_onevision_come_apart():
    """As `generate` calls it with a batch of videos, each of which ends in a newline on some versions."""
    adapter = tiny("llava_onevision")
    pixels = [adapter.preprocess(video(seed, 3)) for seed in (4, 5)]
    alone = [adapter.encode([one])[0].rows for one in pixels]
    batch = adapter.model.model.get_video_features(torch.stack([one["pixel_values"] for one in pixels]))
    for ours, expected in zip(adapter.split_rows(batch.pooler_output, pixels), alone, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_several_images_share_the_budget_and_stay_apart():
    adapter = tiny("qwen3_vl")
    images = [make_image(1, 140, 140), make_image(2, 56, 56), make_image(3, 84, 140)]
    (sample,) = encode(adapter, [Prompt("Which ?", images)])
    counts = [v.n_visual for v in sample.visuals]
    assert counts == [25, 4, 15]
    for slot, visual in zip(sample.slots, sample.visuals, strict=True):
        assert torch.equal(sample.embeds[slot], visual.rows)
    (answer,) = Pipeline(adapter, RandomPruner(), 22, Decoding(max_new_tokens=1))([Prompt("Which ?", images)])
    assert [len(s.indices) for s in answer.selections] == [13, 2, 7]


@FAMILY
def test_pruners_see_the_users_words_and_the_projected_patches(family):
    adapter = tiny(family)
    text = "Is it red ? Answer yes or no."
    image = prompts_of(family)[0].images[0]
    prompt = Prompt(text, [image], query="Is it red ?", question="red", sample="s")
    signals = frozenset({"words", "question"})
    visuals = adapter.encode([adapter.preprocess(image)])
    (features,) = adapter.read(prompt, visuals, signals).features()
    table = adapter.model.get_input_embeddings().weight
    assert torch.equal(features.text, table[tokenizer()("Is it red ?").input_ids])
    assert "".join(features.words).replace(" ", "") == "Isitred?"
    assert [w for w, is_question in zip(features.words, features.question, strict=True) if is_question] == [
        " r",
        "e",
        "d",
    ]
    assert torch.equal(features.visual, visuals[0].tokens)
    assert features.sample == "s"


RECORDED: list[tuple[torch.nn.Module, torch.Tensor]] = []


def recorder(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention that remembers its weights [B, heads, n, n]."""
    weights = (query.double() @ key.double().mT * scaling).softmax(-1)
    RECORDED.append((module, weights))
    return (weights @ value.double()).to(value).transpose(1, 2).contiguous(), weights


@pytest.fixture
def recorded():
    AttentionInterface.register("recorder", recorder)
    RECORDED.clear()
    yield RECORDED
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("recorder", None)


@FAMILY
def test_encoder_attention_is_that_of_an_eager_encoder(family, recorded):
    """CLS rows or column sums of the layer that the projector reads, one image a time, in the order of the tokens."""
    eager, adapter = tiny(family, "recorder"), tiny(family)
    images = [image for prompt in prompts_of(family) for image in prompt.images]
    images += [make_image(8, 100, 100)]
    found = adapter.encode([adapter.preprocess(image) for image in images], frozenset({"attention"}))
    for image, visual in zip(images, found, strict=True):
        recorded.clear()
        one = eager.preprocess(image)
        eager.encode([one])
        expected = MODULES[family].find_attention(family, eager, image, one, recorded)
        torch.testing.assert_close(visual.signals["attention"], torch.tensor(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", QWEN)
def test_hidden_and_keys_of_a_merged_token_are_the_mean_over_its_patches(family, recorded):
    adapter, image = tiny(family), make_image(6, 140, 112)
    signals = frozenset({"hidden", "keys", "attention_to_self"})
    (visual,) = adapter.encode([adapter.preprocess(image)], signals)
    inside = []
    handle = adapter.vision.merger.register_forward_pre_hook(lambda module, args: inside.append(args[0]))
    adapter.encode([adapter.preprocess(image)])
    handle.remove()
    tokens = inside[0].view(-1, 4, 32).mean(1)
    merged = adapter.vision.merger(inside[0])  # in the order of the windows where there are any
    order = [int((merged - row).abs().sum(-1).argmin()) for row in visual.rows]
    assert (order == sorted(order)) is (family != "qwen2_5_vl")
    assert torch.allclose(visual.signals["hidden"], tokens[order], atol=1e-5)
    assert visual.signals["keys"].shape == (20, 16)
    assert visual.signals["attention_to_self"].shape == (20,)


def test_merged_rows_stand_in_their_places_with_their_deepstack_rows():
    """VisionZip without a CLS: as many rows as tokens were kept, each where its target was."""
    adapter, prompt = tiny("qwen3_vl"), prompts_of("qwen3_vl")[1]
    pruner = PRUNERS["visionzip"]()
    pipeline = Pipeline(adapter, pruner, 0.5)
    (sample,) = encode(adapter, [prompt], pruner)
    selections = pipeline.select(sample)
    assert any(not torch.equal(s.embeds, v.rows[s.indices]) for s, v in zip(selections, sample.visuals, strict=True))
    short = adapter.shorten(sample, selections)
    assert torch.equal(short.embeds[short.is_visual], torch.cat([s.embeds for s in selections]))
    for level, layer in enumerate(short.deepstack):
        rows = [v.deepstack[level][s.indices] for s, v in zip(selections, sample.visuals, strict=True)]
        assert torch.equal(layer, torch.cat(rows))
    kept = kept_mask(adapter, sample, selections)
    assert torch.equal(short.position_ids, sample.position_ids[:, kept])


def test_rows_without_a_patch_have_no_position_to_keep():
    adapter = tiny("llava", positions="keep")
    with pytest.raises(InputError, match="repack"):
        Pipeline(adapter, PRUNERS["visionzip"](), 0.5)(prompts_of("llava")[:1])


# Decoding as `generate` does it.


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("ends", [2, [2, 80, 120, 200, 250]])
def test_answers_are_those_of_generate(family, penalty, ends, monkeypatch):
    """Repetition penalty over the full prompt's ids, several ends, left-padded batch; until it ends or the limit."""
    adapter, prompts = tiny(family), prompts_of(family)
    monkeypatch.setattr(adapter.model.generation_config, "repetition_penalty", penalty)
    monkeypatch.setattr(adapter.model.generation_config, "eos_token_id", ends)
    inputs = reference(family, prompts)
    out = adapter.model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = Pipeline(adapter, NoPruner(), 1.0, Decoding(max_new_tokens=24))(prompts)
    listed = ends if isinstance(ends, list) else [ends]
    for answer, row in zip(answers, out.tolist(), strict=True):
        end = next((k for k, token in enumerate(row) if token in listed), len(row))
        assert answer.tokens == row[:end]


def test_sampling_is_seeded_and_within_top_k():
    adapter, prompts = tiny("qwen3_vl"), prompts_of("qwen3_vl")[:1]

    def draw(**fields):
        return Pipeline(adapter, NoPruner(), 1.0, Decoding(max_new_tokens=12, **fields))(prompts)[0].tokens

    hybrid = dict(temperature=0.7, top_p=0.8, top_k=20)
    assert draw(**hybrid, seed=3) == draw(**hybrid, seed=3)
    assert len({tuple(draw(**hybrid, seed=seed)) for seed in range(4)}) > 1
    assert draw(temperature=0.7, top_k=1) == draw(temperature=0.7, top_p=1e-6) == draw()


def test_draws_of_a_sample_are_its_own():
    adapter, prompts = tiny("qwen3_vl"), prompts_of("qwen3_vl")
    hot = Decoding(max_new_tokens=6, temperature=2.0, seed=1)
    together = Pipeline(adapter, NoPruner(), 1.0, hot)(prompts)
    alone = [Pipeline(adapter, NoPruner(), 1.0, hot)([prompt])[0] for prompt in prompts]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    names = [replace(prompts[0], sample=name) for name in "defg"]
    assert len({tuple(answer.tokens) for answer in Pipeline(adapter, NoPruner(), 1.0, hot)(names)}) > 1


def test_draws_have_their_probabilities():
    p = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0]).expand(100_000, -1)
    drawn = inverse(p, torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(drawn[:, 0].bincount(minlength=6) / 100_000, p[0], atol=0.01, rtol=0)


# Prompts.


def test_a_thinking_models_answer_is_what_comes_after_the_thinking():
    adapter = tiny("qwen3_vl", thinking=True)
    after = adapter.chat.render(["image"])[1]
    assert after.endswith("<think>\n")
    assert not tiny("qwen3_vl").chat.render(["image"])[1].endswith("<think>\n")
    ids = tokenizer()("It is </think> not </think>\n\nred .").input_ids
    assert adapter.chat.decode(ids) == "red ."
    assert adapter.chat.decode(tokenizer()("It is not").input_ids) == ""
    assert tiny("qwen3_vl").chat.decode(ids) == "It is </think> not </think>\n\nred ."


def test_system_message_and_template():
    system = tiny("qwen3_vl", system="You are a helpful assistant.").chat.render(["image"])[0]
    assert system.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    before, after = tiny("llava", prompt=PROMPTS["vicuna_v1"]).chat.render(["image", "image"])
    assert before.endswith("to the user's questions. USER: <image><image>\n") and after == " ASSISTANT:"


def test_a_template_is_tokenized_around_its_images():
    """As the original LLaVA code: each side by itself, one BOS, so a tokenizer that adds a blank adds it on both."""
    backend = Tokenizer(
        WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 3, "▁a": 4, "▁": 5, "b": 6, "▁b": 7}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first", split=True), pre_tokenizers.Split("b", "isolated")]
    )
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<s>", "</s>", "<image>"])
    words = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    plain = tiny("llava")
    adapter = LlavaAdapter(plain.model, words, plain.image_processor, prompt="a {image}b {text}")
    visuals = adapter.encode([adapter.preprocess(make_image(0, 56, 56))])
    tokens = adapter.tokenize(Prompt("a", [make_image(0, 56, 56)]), visuals)
    assert tokens.ids.tolist() == [1, 4, 5] + [3] * 16 + [5, 6, 4]
    assert tokens.is_text.tolist() == [False] * 21 + [True]


def padding_rows(length, side):
    """The rows of 24 that MMTok's public code takes for padding: beyond the resized image, in whole pixels of 336."""
    resized = round(length * 336 / side)
    top = (336 - resized) // 2
    return [14 * row + 13 < top or 14 * row >= top + resized for row in range(24)]


def test_what_counts_as_padding():
    for (width, height), n in {
        (640, 427): 16, (640, 428): 17, (500, 375): 18, (500, 333): 16, (1024, 683): 16, (640, 480): 18, (300, 300): 24,
    }.items():  # fmt: skip
        inside = covered(height, width, 24, 336).tolist()
        assert sum(inside) == n
        assert inside == [not out for out in padding_rows(height, width)]


def test_square_padding_with_the_mean_colour():
    plain = tiny("llava")
    adapter = LlavaAdapter(plain.model, plain.tokenizer, plain.image_processor, square=True)
    image = make_image(0, 112, 42)
    canvas = Image.new("RGB", (112, 112), (122, 116, 104))
    canvas.paste(image, (0, 35))
    one = adapter.preprocess(image)
    assert torch.equal(one["pixel_values"], plain.preprocess(canvas)["pixel_values"])
    # 28 pixels a patch: the image lies on 35 .. 77, that is on the rows 1 and 2 of 0 .. 3
    assert one["valid"].tolist() == [[row in (1, 2)] * 4 for row in range(4)]
    (visual,) = adapter.encode([one], frozenset({"valid"}))
    assert visual.signals["valid"].tolist() == [row in (1, 2) for row in range(4) for _ in range(4)]
    assert adapter.box((112, 42)) == (0, -35, 112, 77)
    assert adapter.box((41, 112)) == (-35, 0, 77, 112)
    assert plain.box((112, 42)) == (35, 0, 77, 42)


def test_pixel_limits():
    image = make_image(0, 200, 120)
    small = tiny("qwen3_vl", min_pixels=28 * 28, max_pixels=4 * 28 * 28)
    (visual,) = small.encode([small.preprocess(image)])
    assert visual.grid == (1, 2)
    large = tiny("qwen3_vl", min_pixels=40 * 28 * 28, max_pixels=50 * 28 * 28)
    assert 40 <= large.encode([large.preprocess(image)])[0].n_visual <= 50


@pytest.mark.parametrize("family", sorted(set(MODULES) - set(WITH_VIDEO)))
def test_a_family_without_videos_says_so(family):
    adapter = tiny(family)
    with pytest.raises(InputError, match="takes no video"):
        adapter.kinds([video(0, 2)])


def test_prompts_that_cannot_be_used():
    adapter, image = tiny("qwen3_vl"), make_image(0, 56, 56)
    visuals = adapter.encode([adapter.preprocess(image)])
    for text, message in [(" ", "empty"), ("a <|image_pad|> b", "placeholder"), ("a <|video_pad|>", "placeholder")]:
        with pytest.raises(InputError, match=message):
            adapter.read(Prompt(text, [image]), visuals)
    with pytest.raises(InputError, match="not part of"):
        adapter.read(Prompt("a", [image], query="b"), visuals)
    with pytest.raises(InputError, match="at least one frame"):
        Video([])
    with pytest.raises(InputError, match="one image per prompt"):
        tiny("llava_onevision").kinds([image, image])


# Loading.


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./no/such/folder", "no folder ./no/such/folder"),
        ("/no/such/folder", "no folder /no/such/folder"),
        (
            "nobody/nothing-of-the-kind",
            "cannot load nobody/nothing-of-the-kind: no such folder, and not in .*hf download",
        ),
    ],
)
def test_a_model_that_is_not_there_is_reported_at_once(path, message, monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", lambda self, *args, **kwargs: time.sleep(60))  # a network that hangs
    start = time.perf_counter()
    with pytest.raises(ModelError, match=message):
        load(path)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "video_llava"])
def test_load_from_a_folder(family, tmp_path):
    plain = tiny(family)
    for part in (plain.model, plain.tokenizer, plain.image_processor):
        part.save_pretrained(tmp_path)
    adapter = load(tmp_path, dtype="bfloat16", attn_implementation="eager")
    assert type(adapter) is type(plain)
    assert adapter.model.dtype == torch.bfloat16 and not adapter.model.training
    assert adapter.chat.render(["image"]) == plain.chat.render(["image"])
    (tmp_path / "chat_template.jinja").unlink()  # older repositories keep the processor's template in JSON
    (tmp_path / "chat_template.json").write_text(
        json.dumps({"chat_template": "{{ messages[0]['content'][1]['text'] }}!"})
    )
    assert load(tmp_path).chat.render(["image"]) == ("", "!")
    with pytest.raises(InputError, match="writes 0 placeholders for 1 images"):
        load(tmp_path).tokenize(Prompt("a", [make_image(0, 56, 56)]), [Visual(torch.empty(4, 32), None)])
    with pytest.raises(InputError, match="no_such_option"):
        load(tmp_path, no_such_option=1)
    with pytest.raises(InputError, match="int3"):
        load(tmp_path, dtype="int3")
    weights = load_file(tmp_path / "model.safetensors")
    (gone, row), *rest = weights.items()
    save_file(dict(rest), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"missing .*{re.escape(gone.split('.')[-2])}"):
        load(tmp_path)
    save_file(weights | {"model.nowhere.weight": row.clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"unexpected .*nowhere\.weight"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load(tmp_path)
