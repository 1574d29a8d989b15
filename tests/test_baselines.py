"""Every published method against an independent reading of its rule: plain loops, float64.

Features of +1 and -1 in 4^k dimensions make every cosine exact in float32, with plenty of ties; Gaussian have none.
"""

import dataclasses
import math

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from experiments.benchmarks.demo import Demo
from experiments.results import ROOT
from mipruner.decoding import Decoding
from mipruner.errors import InputError, ModelError
from mipruner.features import Features
from mipruner.models import Prompt, load
from mipruner.pipeline import Pipeline
from mipruner.pruners import (
    PRUNERS,
    AutoPruner,
    CDPruner,
    DARTPruner,
    DecoderPruner,
    DivPruner,
    FastVPruner,
    ImagePruner,
    MMTokPruner,
    NoPruner,
    SparseVLMPruner,
    TrimTokenatorPruner,
    VisionZipPruner,
    VisPruner,
)
from mipruner.pruners.base import DecoderView
from mipruner.pruners.mmtok import STOP_WORDS
from mipruner.pruners.sparsevlm import density_peaks
from mipruner.pruning import prune
from tiny import make_image, tiny, tokenizer

SIZES = [(576, 64), (576, 33), (144, 128), (49, 7), (30, 1), (30, 29), (17, 5), (2, 1)]
METHODS = [CDPruner(), DivPruner(), MMTokPruner(), TrimTokenatorPruner(), VisionZipPruner(), VisPruner()]


def signs(*shape, seed=0):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosines(a, b=None):
    """Cosine table as nested lists, in float64."""
    a = torch.nn.functional.normalize(a.double(), dim=-1)
    b = a if b is None else torch.nn.functional.normalize(b.double(), dim=-1)
    return (a @ b.T).tolist()


def features(n, *, make=normal, d=256, n_text=6, seed=0, **fields):
    ranks = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 5))
    return Features(
        visual=make(n, d, seed=seed),
        text=normal(n_text, d, seed=seed + 1),
        hidden=make(n, d, seed=seed + 2),
        keys=make(n, 64, seed=seed + 3),
        cls_hidden=normal(1, d, seed=seed + 4),
        attention=(ranks // 3).float(),  # ties in threes
        project=torch.nn.functional.gelu,
        **fields,
    )


def first_max(values, allowed):
    return max(allowed, key=lambda k: (values[k], -k))


# ---------------------------------------------------------------------------------------------------------- DivPrune


def divprune(visual, n_keep):
    distance = [[1 - c for c in row] for row in cosines(visual)]
    n = len(distance)
    start = [sorted(distance[i][j] for i in range(n))[1] for j in range(n)]
    kept = [first_max(start, range(n))]
    while len(kept) < n_keep:
        score = [min(distance[i][j] for i in kept) for j in range(n)]
        kept.append(first_max(score, [j for j in range(n) if j not in kept]))
    return sorted(kept)


@pytest.mark.parametrize("make", [normal, signs])
@pytest.mark.parametrize(("n", "n_keep"), SIZES)
def test_divprune(n, n_keep, make):
    sample = features(n, make=make)
    assert DivPruner()(sample, n_keep).indices.tolist() == divprune(sample.visual, n_keep)


def test_divprune_picks_no_duplicate_twice():
    same = torch.ones(9, 4)
    assert DivPruner()(Features(visual=same, text=same), 8).indices.tolist() == [*range(8)]


# --------------------------------------------------------------------------------------------------------- VisPruner


def vispruner(attention, hidden, n_keep, share):
    cosine = cosines(hidden)
    order = sorted(range(len(cosine)), key=lambda k: (-attention[k], k))
    n_important = int(n_keep * share)
    kept, rest = order[:n_important], order[n_important:]
    wanted = n_keep - n_important
    while wanted and len(rest) > wanted:
        a, b = rest[0::2], rest[1::2]
        likeness = {i: max(cosine[i][j] for j in b) for i in a}
        a = sorted(a, key=lambda i: -likeness[i])  # python's sort is stable
        rest = a[min(8, len(rest) - wanted, len(a)) :] + b
    return sorted(kept + (rest if wanted else []))


@pytest.mark.parametrize("share", [0.5, 0.75, 0.0, 1.0])
@pytest.mark.parametrize(("n", "n_keep"), SIZES)
def test_vispruner(n, n_keep, share):
    sample = features(n, make=signs)
    expected = vispruner(sample.attention.tolist(), sample.hidden, n_keep, share)
    assert VisPruner(important=share)(sample, n_keep).indices.tolist() == expected


# --------------------------------------------------------------------------------------------------------- VisionZip


def visionzip_groups(received, keys, n_dominant, n_contextual):
    cosine = cosines(keys)
    order = sorted(range(len(cosine)), key=lambda k: (-received[k], k))
    dominant = sorted(order[:n_dominant])
    rest = [k for k in range(len(cosine)) if k not in dominant]
    step = max(1, len(rest) // n_contextual) if n_contextual else 1
    targets = rest[::step][:n_contextual]
    groups = {t: [] for t in targets}
    for k in rest:
        if targets and k not in targets:
            groups[targets[first_max([cosine[k][t] for t in targets], range(len(targets)))]].append(k)
    return dominant, groups


def merged(rows, groups):
    return [rows[t] + (rows[g].mean(0) if g else 0) for t, g in groups.items()]


@pytest.mark.parametrize(("n", "n_keep"), SIZES)
def test_visionzip_with_cls(n, n_keep):
    sample = features(n, make=signs)
    n_contextual = round(n_keep * 10 / 64)
    dominant, groups = visionzip_groups(sample.attention.tolist(), sample.keys, n_keep - 1 - n_contextual, n_contextual)
    hidden = sample.hidden.double()
    rows = torch.stack([sample.cls_hidden[0].double(), *hidden[dominant], *merged(hidden, groups)])
    selection = VisionZipPruner()(sample, n_keep)
    assert selection.n_rows == n_keep
    assert selection.indices.tolist() == sorted([*dominant, *groups])
    torch.testing.assert_close(selection.embeds.double(), sample.project(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n_keep", "n_contextual"), [(192, 30), (128, 20), (64, 10), (32, 5)])
def test_visionzip_has_the_published_splits(n_keep, n_contextual):
    sample = features(576, make=signs)
    groups = visionzip_groups(sample.attention.tolist(), sample.keys, n_keep - 1 - n_contextual, n_contextual)[1]
    expected = torch.stack(merged(sample.hidden, groups))
    rows = VisionZipPruner()(sample, n_keep).embeds
    torch.testing.assert_close(rows[-n_contextual:], sample.project(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("n", "n_keep"), [(144, 100), (144, 9), *SIZES[3:]])
def test_visionzip_without_cls_merges_in_place(n, n_keep):
    sample = features(n, make=signs)
    itself = normal(n, seed=9).abs()
    sample = Features(
        visual=sample.visual, text=sample.text, keys=sample.keys, attention=sample.attention, attention_to_self=itself
    )
    n_contextual = min(max(int(0.05 * n), 1), n_keep // 2)
    received = (sample.attention + itself).tolist()
    dominant, groups = visionzip_groups(received, sample.keys, n_keep - n_contextual, n_contextual)
    visual = sample.visual.double()
    rows = dict(zip(dominant, visual[dominant], strict=True)) | dict(zip(groups, merged(visual, groups), strict=True))
    selection = VisionZipPruner()(sample, n_keep)
    assert selection.indices.tolist() == sorted(rows)
    torch.testing.assert_close(
        selection.embeds.double(), torch.stack([rows[k] for k in sorted(rows)]), atol=1e-5, rtol=1e-5
    )


# ---------------------------------------------------------------------------------------------------------- CDPruner


def cdpruner(visual, score, n_keep):
    """Greedy by the determinant itself: the pick with the largest log det of the chosen block."""
    q = [(s - min(score) + 1e-6) / (max(score) - min(score)) for s in score]
    kernel = torch.tensor(cosines(visual), dtype=torch.float64)
    kernel = torch.tensor(q, dtype=torch.float64)[:, None] * kernel * torch.tensor(q, dtype=torch.float64)
    kept = []
    while len(kept) < n_keep:
        rest = [j for j in range(len(q)) if j not in kept]
        index = torch.tensor([[*kept, j] for j in rest])
        gain = torch.linalg.slogdet(kernel[index[:, :, None], index[:, None, :]]).logabsdet
        kept.append(rest[int(gain.argmax())])
    return sorted(kept)


@pytest.mark.parametrize(("n", "n_keep"), [(144, 24), *SIZES[3:]])
def test_cdpruner(n, n_keep):
    clip_visual, clip_text = normal(n, 32, seed=7), normal(3, 32, seed=8)
    sample = features(n, clip_visual=clip_visual, clip_text=clip_text)
    table = cosines(clip_visual, clip_text)
    clip = [sum(-c for c in row) / len(row) for row in table]
    assert CDPruner().source(sample) == "clip"
    assert CDPruner()(sample, n_keep).indices.tolist() == cdpruner(sample.visual, clip, n_keep)
    projection = [sum(row) / len(row) for row in cosines(sample.visual, sample.text)]
    assert CDPruner(relevance="projection")(sample, n_keep).indices.tolist() == cdpruner(
        sample.visual, projection, n_keep
    )


def test_cdpruner_without_clip_reads_the_question_only():
    sample = features(40, question=torch.tensor([True, True, False, True, False, False]))
    score = [(row[0] + row[1] + row[3]) / 3 for row in cosines(sample.visual, sample.text)]
    assert CDPruner().source(sample) == "projection"
    assert CDPruner()(sample, 9).indices.tolist() == cdpruner(sample.visual, score, 9)
    with pytest.raises(ValueError, match="names its CLIP"):
        CDPruner(relevance="clip")(sample, 9)


def test_cdpruner_survives_an_exhausted_rank():
    """Five directions, thirty tokens: one token of each direction, and then relevance decides."""
    visual, text = torch.eye(5).repeat_interleave(6, 0), torch.tensor([[1.0, 2, 3, 4, 5]])
    kept = CDPruner()(Features(visual=visual, text=text), 12).indices.tolist()
    assert kept == [0, 6, 12, 18, 19, 20, *range(24, 30)]


def test_cdpruner_with_equal_relevance_is_a_plain_dpp():
    visual = signs(20, 256)
    kept = CDPruner()(Features(visual=visual, text=torch.zeros(1, 256)), 6).indices.tolist()
    kernel, expected = torch.tensor(cosines(visual)), [0]
    while len(expected) < 6:
        rest = [j for j in range(20) if j not in expected]
        gain = [kernel[[*expected, j]][:, [*expected, j]].logdet() for j in rest]
        expected.append(rest[int(torch.stack(gain).argmax())])
    assert kept == sorted(expected)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small random CLIP whose vision width is that of the tiny LLaVA, with a text tower of 12 tokens."""
    folder = str(tmp_path_factory.mktemp("clip"))
    torch.manual_seed(0)
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 300, "max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1}
    vision = tiny("llava").model.config.vision_config.to_dict()
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@torch.inference_mode()
def test_clip_relevance_is_measured_in_the_named_clip(clip_folder):
    adapter, clip = tiny("llava", clip=clip_folder), CLIPModel.from_pretrained(clip_folder).eval()
    question = "what colour is the umbrella beside the old green house on the hill"
    prompt = Prompt(f"{question}\nAnswer briefly.", [make_image(1, 90, 70)], question=question)
    pipeline = Pipeline(adapter, CDPruner(), 5)
    pixels = adapter.preprocess(prompt.images[0])
    visuals = list(pipeline.see(prompt.images).values())
    (features,) = adapter.read(prompt, visuals, CDPruner().signals).features()

    vision = adapter.model.model.vision_tower(pixels["pixel_values"], output_hidden_states=True)
    patches = clip.visual_projection(clip.vision_model.post_layernorm(vision.hidden_states[-2][:, 1:]))[0]
    torch.testing.assert_close(features.clip_visual, patches, atol=1e-5, rtol=1e-4)
    ids = adapter.tokenizer(question)["input_ids"]
    assert len(ids) > 12
    for k, segment in enumerate(ids[start : start + 12] for start in range(0, len(ids), 12)):
        expected = clip.get_text_features(input_ids=torch.tensor([segment])).pooler_output[0]  # no padding at all
        torch.testing.assert_close(features.clip_text[k], expected, atol=1e-5, rtol=1e-4)
    assert len(features.clip_text) == k + 1
    assert CDPruner().source(features) == "clip"
    (answer,) = pipeline([prompt])
    assert answer.selections[0].indices.tolist() == CDPruner()(features, 5).indices.tolist()
    assert answer.notes == {"relevance": "clip"}


@torch.inference_mode()
def test_clip_measures_in_float32_beside_a_model_in_bfloat16(clip_folder):
    """As CDPruner's public code: text tower and projection keep their precision whatever the language model has."""
    adapter, clip = tiny("llava", dtype=torch.bfloat16, clip=clip_folder), CLIPModel.from_pretrained(clip_folder).eval()
    prompt = Prompt("what is it", [make_image(1, 90, 70)])
    visuals = list(Pipeline(adapter, CDPruner(), 5).see(prompt.images).values())
    (features,) = adapter.read(prompt, visuals, CDPruner().signals).features()
    assert features.visual.dtype == torch.bfloat16
    assert features.clip_visual.dtype == features.clip_text.dtype == torch.float32
    ids = torch.tensor([adapter.tokenizer("what is it")["input_ids"]])
    expected = clip.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(features.clip_text, expected, atol=1e-6, rtol=1e-5)
    pixels = adapter.preprocess(prompt.images[0])["pixel_values"].bfloat16()
    hidden = adapter.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    patches = clip.visual_projection(clip.vision_model.post_layernorm(hidden.float()))[0]
    torch.testing.assert_close(features.clip_visual, patches, atol=1e-5, rtol=1e-4)
    assert not torch.equal(patches, patches.bfloat16().float()), "what bfloat16 would lose is there"


def test_a_clip_that_is_not_there_is_named_when_it_is_needed():
    adapter, prompt = tiny("llava", clip="/no/such/clip"), Prompt("what is it", [make_image(1, 90, 70)])
    Pipeline(adapter, MMTokPruner(), 5)([prompt])
    with pytest.raises(ModelError, match="/no/such/clip"):
        Pipeline(adapter, CDPruner(), 5)([prompt])


# ------------------------------------------------------------------------------------------------------------- MMTok


def mmtok(text, visual, hidden, n_keep, tau_text=0.02, tau_visual=0.2, allowed=None):
    def soft(row, tau):
        top = max(row)
        e = [math.exp((x - top) / tau) for x in row]
        return [x / sum(e) for x in e]

    table = [[p / len(text) for p in soft(row, tau_text)] for row in cosines(text, visual)]
    table += [[0.5 * p / len(visual) for p in soft(row, tau_visual)] for row in cosines(hidden)]
    columns = list(zip(*table, strict=True))
    best, kept = [0.0] * len(table), []
    while len(kept) < n_keep:
        gain = [sum(max(0.0, m - b) for m, b in zip(column, best, strict=True)) for column in columns]
        kept.append(
            first_max(gain, [j for j in range(len(columns)) if j not in kept and (not allowed or j in allowed)])
        )
        best = [max(m, b) for m, b in zip(columns[kept[-1]], best, strict=True)]
    return sorted(kept)


@pytest.mark.parametrize(("n", "n_keep"), [(144, 24), *SIZES[3:]])
def test_mmtok(n, n_keep):
    sample = features(n, d=64)
    assert MMTokPruner()(sample, n_keep).indices.tolist() == mmtok(sample.text, sample.visual, sample.hidden, n_keep)


def test_mmtok_covers_the_words_with_content():
    words = [" What", " colour", " is", " the", " sun", "flower", "?", " Answer", " briefly", "."]
    question = torch.tensor([True] * 7 + [False] * 3)
    sample = features(60, d=32, n_text=10, words=words, question=question)
    content = sample.text[[1, 4, 5]]
    assert MMTokPruner()(sample, 9).indices.tolist() == mmtok(content, sample.visual, sample.hidden, 9)
    every = mmtok(sample.text[:7], sample.visual, sample.hidden, 9)
    assert MMTokPruner(stop_words=False)(sample, 9).indices.tolist() == every
    bare = features(60, d=32, n_text=3, words=[" What", " is", " it"])
    assert MMTokPruner()(bare, 9).indices.tolist() == mmtok(bare.text, bare.visual, bare.hidden, 9)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_mmtok_on_qwen_covers_the_whole_text_behind_a_prefix(family):
    """The public code for Qwen: "Question: " and all that the user says, format sentence included, no stop words."""
    adapter, text = tiny(family), "what is it\nanswer the question using a single word"
    image = make_image(1, 280, 224)
    pruner = MMTokPruner(tau_text=0.01, stop_words=False, prefix="Question: ", rounding="down")
    prompt = Prompt(text, [image], question="what is it")
    visual = Pipeline(adapter, pruner, 1.0).see([image])[id(image)]
    n = visual.n_visual
    ids = torch.tensor(adapter.tokenizer("Question: " + text, add_special_tokens=False)["input_ids"])
    rows = adapter.model.get_input_embeddings()(ids).detach()
    expected = mmtok(rows, visual.tokens, visual.signals["hidden"], int(0.39 * n), tau_text=0.01)
    (answer,) = Pipeline(adapter, pruner, 0.39)([prompt])
    assert int(0.39 * n) != round(0.39 * n)
    assert answer.selections[0].indices.tolist() == expected

    inputs = adapter.image_processor([image], size=adapter.image_size, return_tensors="pt")
    before, after = adapter.chat.render(["image"])
    placeholder = adapter.chat.placeholders["image"]
    ids = adapter.tokenizer(before.replace(placeholder, placeholder * n) + text + after, return_tensors="pt").input_ids
    with prune(adapter.model, pruner, keep=0.39, tokenizer=adapter.tokenizer, text=text) as pruning:
        adapter.model.generate(
            input_ids=ids,
            mm_token_type_ids=(ids == adapter.placeholder_ids["image"]).long(),
            **inputs,
            max_new_tokens=1,
        )
    assert pruning.selections[0][0].indices.tolist() == expected


def test_mmtok_refuses_a_prefix_that_nobody_can_tokenize():
    with pytest.raises(InputError, match="stop_words=false"):
        MMTokPruner(prefix="Question: ")
    with pytest.raises(InputError, match="tokenizer"):
        MMTokPruner(prefix="Question: ", stop_words=False)(features(9), 3)


def test_mmtok_keeps_a_piece_of_a_word_that_looks_like_a_stop_word():
    sample = features(5, n_text=3, words=[" the", "at", "re"])
    assert MMTokPruner().content(sample).tolist() == [True, True, True]


def test_mmtok_reads_the_published_stop_words():
    assert len(STOP_WORDS) == 47
    words = [" Is", " there", " a", " snowboard", " in", " the", " image", "?"]
    content = MMTokPruner().content(features(9, n_text=8, words=words)).tolist()
    assert [w for w, said in zip(words, content, strict=True) if said] == [" there", " snowboard", " in", " image"]


@pytest.mark.parametrize("seed", range(4))
def test_mmtok_never_picks_padding_but_covers_it(seed):
    """Padding stays in both softmaxes and among the rows, each of which weighs 1 / N."""
    valid = torch.tensor([k % 3 > 0 for k in range(60)])
    sample = features(60, d=32, valid=valid, seed=seed)
    inside = valid.nonzero()[:, 0]
    expected = mmtok(sample.text, sample.visual, sample.hidden, 11, allowed=inside.tolist())
    assert MMTokPruner()(sample, 11).indices.tolist() == expected
    kept = MMTokPruner()(sample, 45).indices
    assert set(inside.tolist()) < set(kept.tolist())
    assert kept.unique().numel() == 45


# ----------------------------------------------------------------------------------------------------- TrimTokenator


def trimtokenator_port(visual, text, n_keep):
    visual, text = visual.double(), text.double()
    far = [sum(float((v - t).square().sum()) for t in text) / len(text) for v in visual]
    pool = sorted(range(len(far)), key=lambda k: (far[k], k))[: max(n_keep, int(0.8 * len(far)))]
    cosine = cosines(visual)
    kept = [min(pool, key=lambda i: sum(cosine[i][j] for j in pool))]
    while len(kept) < n_keep:
        kept.append(min((j for j in pool if j not in kept), key=lambda j: sum(cosine[i][j] for i in kept)))
    return sorted(kept)


def trimtokenator_unit(visual, text, n_keep, multiple=2):
    visual, text = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (visual, text))
    far = [sum(float((v - t).norm()) for t in text) / len(text) for v in visual]
    pool = sorted(range(len(far)), key=lambda k: (far[k], k))[: multiple * n_keep]
    distance = {(i, j): float((visual[i] - visual[j]).norm()) for i in pool for j in pool}
    kept = [pool[0]]
    while len(kept) < n_keep:
        rest = [j for j in pool if j not in kept]
        kept.append(max(rest, key=lambda j: sum(distance[i, j] for i in kept)))
    return sorted(kept)


@pytest.mark.parametrize(("n", "n_keep"), [(100, 24), *SIZES[3:]])
def test_trimtokenator(n, n_keep):
    sample = features(n, d=32)
    for reading, rule in (("port", trimtokenator_port), ("unit", trimtokenator_unit)):
        expected = rule(sample.visual, sample.text, n_keep)
        assert TrimTokenatorPruner(reading)(sample, n_keep).indices.tolist() == expected
    assert TrimTokenatorPruner() == TrimTokenatorPruner("port")


# ------------------------------------------------------------------------------------------- inside the language model


def decoder_view(n_visual, *, n_before=3, n_after=9, layer=2, n_layers=32, d=16, n_heads=4, seed=0, **fields):
    """A prompt at the input of a layer, with random states and an attention table that is softmaxed over all tokens."""
    generator = torch.Generator().manual_seed(seed)
    n = n_before + n_visual + n_after
    visual = torch.tensor([n_before <= i < n_before + n_visual for i in range(n)])
    logits = 2 * torch.randn(n_heads, n, n, generator=generator)
    table = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    hidden = torch.randn(n, d, generator=generator)
    fields = {
        "layer": layer,
        "n_layers": n_layers,
        "n_start": n_visual,
        "keys": torch.randn(n, 2, d, generator=generator),
        "prompt": torch.randn(n, d, generator=generator),
        "prompt_visual": visual,
        "encoder_attention": torch.rand(n_visual, generator=generator),
    } | fields
    view = DecoderView(
        hidden=hidden, visual=visual, attention=lambda rows: table[:, rows], norm=lambda x: 2 * x + 1, **fields
    )
    return view, table.double()


@pytest.mark.parametrize(("n", "n_keep"), SIZES)
def test_fastv(n, n_keep):
    view, table = decoder_view(n)
    score = [sum(float(table[h, -1, 3 + i]) for h in range(4)) / 4 for i in range(n)]
    expected = sorted(sorted(range(n), key=lambda i: -score[i])[:n_keep])
    assert FastVPruner().reduce(view, n_keep).indices.tolist() == expected
    assert FastVPruner(layer=3).stages(n, n_keep, 32) == {3: n_keep}


def test_fastv_takes_the_first_of_equals():
    view, _ = decoder_view(8, keys=torch.zeros(20, 2, 4))
    view = dataclasses.replace(view, attention=lambda rows: torch.full((4, len(rows), 20), 0.05))
    assert FastVPruner().reduce(view, 3).indices.tolist() == [0, 1, 2]


def dart(view, budget, order):
    """The rule with dictionaries; ``order`` is how the eight pivots take turns."""
    states = (2 * view.hidden + 1).double()
    norm = view.keys.double().abs().sum((1, 2)).tolist()
    image = [i for i, v in enumerate(view.visual.tolist()) if v]
    after = range(image[-1] + 1, len(norm))
    pivots = sorted(image, key=lambda i: -norm[i])[:4]
    words = sorted(after, key=lambda i: -norm[i])[:4]
    pool, kept = [i for i in image if i not in pivots], list(pivots)
    for p in order(pivots + words):
        cosine = {j: float(states[p] @ states[j] / states[p].norm() / states[j].norm()) for j in pool}
        taken = sorted(pool, key=cosine.__getitem__)[: budget // 8]
        pool = [j for j in pool if j not in taken]
        kept += taken
    return sorted(i - image[0] for i in kept)


@pytest.mark.parametrize(
    ("n", "n_keep", "kept"), [(576, 64, 68), (576, 128, 132), (144, 39, 36), (49, 48, 49), (30, 1, 4)]
)
def test_dart(n, n_keep, kept):
    view, _ = decoder_view(n)
    indices = DARTPruner().reduce(view, n_keep).indices.tolist()
    assert indices == dart(view, n_keep, lambda pivots: list(set(pivots)))
    assert len(indices) == kept
    assert DARTPruner().stages(n, n_keep, 32) == {2: kept}


@pytest.mark.parametrize(("n", "n_keep"), SIZES)
def test_dart_with_an_exact_count(n, n_keep):
    view, _ = decoder_view(n)
    indices = DARTPruner(exact=True).reduce(view, n_keep).indices.tolist()
    assert len(set(indices)) == n_keep == DARTPruner(exact=True).stages(n, n_keep, 32)[2]


@pytest.mark.parametrize(("keep", "n"), [(0.222, 576), (0.1, 80), (0.25, 576), (0.334, 391), (1.0, 40), (0.01, 30)])
def test_dart_on_qwen_cuts_the_budget_off(keep, n):
    """The public code for Qwen: int(N (1 - reduction)); 0.9 off 80 tokens is 7 there, since 1 - 0.9 < 0.1."""
    assert DARTPruner(rounding="down").budget(keep, n) == max(1, int(n * (1 - (1 - keep))))
    assert DARTPruner(rounding="down").budget(7, n) == 7 == DARTPruner().budget(7, n)


def test_dart_with_little_text_after_the_image():
    view, _ = decoder_view(40, n_after=2)
    assert len(DARTPruner().reduce(view, 18).indices) == 4 + 6 * (18 // 6)


def sparsevlm_raters(prompt, visual):
    """Text tokens after the image that get more than the mean share of the visual tokens' softmax."""
    prompt, image = prompt.double(), [i for i, v in enumerate(visual.tolist()) if v]
    text = range(image[-1] + 1, len(prompt))
    shares = {j: 0.0 for j in text}
    for i in image:
        logits = {j: float(prompt[i] @ prompt[j]) for j in text}
        top = max(logits.values())
        total = sum(math.exp(x - top) for x in logits.values())
        for j in text:
            shares[j] += math.exp(logits[j] - top) / total / len(image)
    return [j for j in text if shares[j] > sum(shares.values()) / len(shares)]


def clusters(rows, c):
    """Density-peak clustering: centres in order, and for each row the number of its cluster."""
    n, d = rows.shape
    rows = rows.double()
    distance = [[float((a - b).norm()) / d**0.5 for b in rows] for a in rows]
    density = [math.exp(-sum(x * x for x in sorted(row)[:c]) / c) for row in distance]
    far = max(max(row) for row in distance)
    rank = sorted(range(n), key=lambda i: -density[i])  # of equals the first is the denser
    delta = [min([distance[i][j] for j in rank[: rank.index(i)]], default=far) for i in range(n)]
    centres = sorted(range(n), key=lambda i: -delta[i] * density[i])[:c]
    nearest = [min(range(c), key=lambda k: distance[i][centres[k]]) for i in range(n)]
    for k, i in enumerate(centres):
        nearest[i] = k
    return centres, nearest


def recycled(hidden, score, n_keep):
    order = sorted(range(len(score)), key=lambda i: -score[i])
    dropped = order[n_keep:]
    best = dropped[: int(0.3 * len(dropped)) + 1]
    centres, nearest = clusters(hidden[best], int(len(best) / 10) + 1)
    groups = [[best[i] for i in range(len(best)) if nearest[i] == k] for k in range(len(centres))]
    rows = [sum(hidden[i].double() for i in group) / (len(group) + 1e-6) for group in groups]
    return sorted(order[:n_keep]), rows, [best[i] for i in centres]


def assert_reduces(reduction, hidden, expected):
    indices, rows, centres = expected
    assert reduction.indices.tolist() == indices
    assert reduction.centres.tolist() == centres
    torch.testing.assert_close(reduction.merge.double() @ hidden.double(), torch.stack(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("n", "n_keep", "layer"), [(576, 192, 3), (576, 64, 7), (300, 70, 16), (60, 1, 3), (20, 19, 3), (2, 1, 7)]
)
def test_sparsevlm(n, n_keep, layer):
    view, table = decoder_view(n, layer=layer, n_start=n)
    raters = sparsevlm_raters(view.prompt, view.prompt_visual)
    assert 0 < len(raters) < 9
    score = [sum(float(table[h, r, 3 + i]) for h in range(4) for r in raters) for i in range(n)]
    keep = min(SparseVLMPruner.schedule(n, n_keep, 32)[layer], n - 1)
    hidden = view.hidden[view.visual]
    assert_reduces(SparseVLMPruner().reduce(view, n_keep), hidden, recycled(hidden, score, keep))


def test_sparsevlm_reads_the_same_words_after_tokens_were_dropped():
    """At a later stage the prompt is shorter, its text is not."""
    view, table = decoder_view(40, layer=7)
    n_start = 100
    start = torch.randn(n_start + 12, 16, generator=torch.Generator().manual_seed(3))
    was_visual = torch.tensor([3 <= i < 3 + n_start for i in range(n_start + 12)])
    view = dataclasses.replace(view, prompt=start, prompt_visual=was_visual, n_start=n_start)
    raters = [r - (n_start - 40) for r in sparsevlm_raters(start, was_visual)]
    score = [sum(float(table[h, r, 3 + i]) for h in range(4) for r in raters) for i in range(40)]
    hidden, keep = view.hidden[view.visual], SparseVLMPruner.schedule(n_start, 20, 32)[7]
    assert_reduces(SparseVLMPruner().reduce(view, 20), hidden, recycled(hidden, score, keep))


def test_sparsevlm_has_the_published_schedule():
    published = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
    entering = {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)}
    for n_keep, counts in published.items():
        assert SparseVLMPruner.schedule(576, n_keep, 32) == dict(zip((3, 7, 16), counts, strict=True))
        assert SparseVLMPruner().stages(576, n_keep, 32) == dict(zip((3, 7, 16), entering[n_keep], strict=True))
    means = {192: 206.5, 128: 145.4, 96: 114.1, 64: 82.2}
    for n_keep, mean in means.items():
        assert sum(SparseVLMPruner().entering(576, n_keep, 32)) / 32 == pytest.approx(mean, abs=0.06)
    assert SparseVLMPruner.schedule(576, 80, 32) == {3: 152, 7: 39, 16: 22}  # half way from 64 to 96, half to even
    assert SparseVLMPruner.schedule(144, 16, 36) == {3: 16, 8: 8, 18: 4}


def test_equal_states_make_one_cluster_each_from_the_first():
    centres, cluster = density_peaks(torch.ones(12, 4), 3)
    assert sorted(centres.tolist()) == sorted(set(centres.tolist()))
    assert set(cluster.tolist()) == {0, 1, 2}


def information(table):
    """Bits of [n_heads, n_text, n_visual], rows as they are."""
    total, (n_heads, n_rows, n) = 0.0, table.shape
    for h in range(n_heads):
        marginal = [sum(float(table[h, x, y]) for x in range(n_rows)) / n_rows for y in range(n)]
        for x in range(n_rows):
            for y in range(n):
                joint = float(table[h, x, y]) / n_rows
                total += joint * math.log2(max(joint / (marginal[y] / n_rows + 1e-6), 1e-6))
    return total


def autoprune_leaving(keeps, n):
    """Tokens that leave each layer: those kept, and one for each cluster of the recycled."""
    out = []
    for keep in keeps:
        if keep < n:
            n = keep + int((int(0.3 * (n - keep)) + 1) / 10) + 1
        out.append(n)
    return out


def autoprune_curve(shape, first, n, wanted):
    """The first scale, in small steps, by which enough tokens leave the layers, recycled ones counted."""
    n_first = autoprune_leaving([first], n)[0]
    for s in range(1, 40000):
        keeps = [first, *(max(1, math.ceil((n_first - 1) * min(s / 2000 * y, 1))) for y in shape)]
        if sum(autoprune_leaving(keeps, n)) >= wanted:
            return keeps


@pytest.mark.parametrize("n_keep", [64, 128, 192])
@pytest.mark.parametrize("bits", [0.0, 0.5, 1.5])
def test_autoprune_leaves_its_budget_on_average(n_keep, bits):
    curve = AutoPruner().curve(bits, 576, n_keep, 32)
    assert round(sum(autoprune_leaving(curve, 576)) / 32, 1) == n_keep


def test_autoprune_first_and_second_stage():
    n, n_keep = 60, 12
    view, table = decoder_view(n, layer=1, n_after=5)
    text = table[:, -5:, 3:-5]
    weight = 0.3 * information(text) / 5
    score = [float(view.encoder_attention[i]) + weight * float(text[..., i].mean()) for i in range(n)]
    hidden = view.hidden[view.visual]
    assert_reduces(AutoPruner().reduce(view, n_keep), hidden, recycled(hidden, score, 30))

    later, table = decoder_view(33, layer=2, n_after=5, n_start=n, memory=view.memory, seed=1)
    text = table[:, -5:, 3:-5]
    bits = information(text)
    k = max(0.4 - 0.2 * bits, 0)
    shape = [0.75 / (1 + math.exp(k * (layer - 14.9 - k))) for layer in range(1, 32)]
    curve = AutoPruner().curve(bits, n, n_keep, 32)
    assert curve == autoprune_curve(shape, 30, n, 32 * n_keep)
    hidden, score = later.hidden[later.visual], text.mean((0, 1)).tolist()
    assert_reduces(AutoPruner().reduce(later, n_keep), hidden, recycled(hidden, score, curve[1]))


def test_autoprune_falls_faster_where_the_words_say_less():
    low, high = (AutoPruner().curve(bits, 576, 64, 32) for bits in (0.0, 1.5))
    assert low[3] > high[3] and low[-1] < high[-1]
    assert sorted(low, reverse=True) == low


@pytest.mark.parametrize(
    ("n_keep", "fastv", "fastv_3", "dart"), [(192, 216, 228, 219.8), (64, 96, 112, 99.8), (32, 66, 83, 69.8)]
)
def test_what_a_nominal_budget_costs_in_the_mean(n_keep, fastv, fastv_3, dart):
    for pruner, mean in ((FastVPruner(), fastv), (FastVPruner(layer=3), fastv_3), (DARTPruner(), dart)):
        assert sum(pruner.entering(576, n_keep, 32)) / 32 == pytest.approx(mean, abs=0.06)


@pytest.mark.parametrize(("nominal", "matched"), [(192, 166), (128, 98), (64, 30)])
def test_fastv_matched_by_the_mean_over_layers(nominal, matched):
    pruner = FastVPruner(budget_match="layer_mean")
    assert pruner.nominal(576, nominal, 32) == matched
    assert FastVPruner().nominal(576, nominal, 32) == nominal


def test_every_layer_mean_is_the_nearest_there_is():
    for pruner in (FastVPruner("layer_mean", 3), SparseVLMPruner("layer_mean"), DARTPruner("layer_mean")):
        for target in (100, 192, 300, 575, 576):
            entering = pruner.entering(576, pruner.nominal(576, target, 32), 32)
            assert abs(sum(entering) / 32 - target) <= 4
    assert AutoPruner("layer_mean").nominal(576, 64, 32) == 64
    with pytest.raises(InputError, match=r"least is 36\.9"):
        FastVPruner(budget_match="layer_mean").nominal(576, 32, 32)


# -------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_batch_is_its_samples(method):
    n, fields = 50, ("visual", "text", "hidden", "keys", "cls_hidden", "attention")
    samples = [features(n, make=signs, d=64, seed=10 * k) for k in range(3)]
    stacked = {f: torch.stack([getattr(s, f) for s in samples]) for f in fields}
    batch = method(Features(**stacked, project=samples[0].project), 12)
    for row, sample in enumerate(samples):
        alone = method(sample, 12)
        assert batch.indices[row].tolist() == alone.indices.tolist()
        if alone.embeds is not None:
            torch.testing.assert_close(batch.embeds[row], alone.embeds)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("n_keep", [1, 2, 7, 30, 47])
def test_identical_tokens(method, n_keep):
    def same(*shape, seed=0):
        return normal(1, shape[-1], seed=seed).expand(shape)

    sample = features(48, make=same, d=24)
    selection = method(sample, n_keep)
    assert selection.n_rows == n_keep
    assert selection.indices.unique().tolist() == selection.indices.tolist()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_keep_all(method):
    selection = method(features(40), 40)
    assert selection.indices.tolist() == [*range(40)]
    assert selection.embeds is None


@pytest.mark.parametrize("method", [VisionZipPruner(), VisPruner(), MMTokPruner()], ids=lambda m: type(m).__name__)
def test_a_missing_feature_is_named(method):
    with pytest.raises(ValueError, match=f"{type(method).__name__} needs"):
        method(Features(visual=normal(9, 4), text=normal(2, 4)), 3)


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(scope="module", params=["llava", "qwen3vl"])
def demo(request):
    """A trained demo model, and four questions about its world; for Qwen3-VL about images of two sizes."""
    canvases = [(336, 336)] if request.param == "llava" else [(280, 280), (252, 336)]
    benchmark = Demo(n_scenes=len(canvases), seed=5, canvases=canvases)
    of_each = 4 // len(canvases)
    samples = [sample for k in "01" for sample in [s for s in benchmark.samples() if s.image_id == k][:of_each]]
    images = {sample.image_id: benchmark.images(sample.image_id) for sample in samples}
    prompts = [Prompt(s.text, images[s.image_id], question=s.question, sample=s.id) for s in samples]
    adapter = load(ROOT / "experiments/demo" / request.param, dtype="float32")
    Pipeline(adapter, NoPruner(), 1.0)(prompts[:1])  # transformers leaves hooks of its own
    return adapter, benchmark, samples, prompts


@pytest.mark.parametrize("name", PRUNERS)
def test_on_the_demo(demo, name):
    """Half of the tokens are enough to answer, in one padded batch; no hook stays behind."""
    adapter, benchmark, samples, prompts = demo
    before = n_hooks(adapter.model)
    pruner = PRUNERS[name](**({"keep_before": 0.75} if name == "mi_fastv" else {}))
    if isinstance(pruner, ImagePruner) and not adapter.any_size:
        with pytest.raises(InputError, match="scales every image to sizes of its own"):
            Pipeline(adapter, pruner, 0.5)
        return
    answers = Pipeline(adapter, pruner, 0.5, Decoding(max_new_tokens=2))(prompts)
    assert n_hooks(adapter.model) == before
    right = sum(benchmark.correct(sample, answer.text) for sample, answer in zip(samples, answers, strict=True))
    assert right >= (2 if name == "resize" else 3)  # half of the pixels are smaller glyphs than it was trained on
    for answer in answers:
        total, per_layer = sum(answer.n_visual), answer.visual_tokens_per_layer
        exact = answer.n_keep == (total if name == "none" else round(total / 2))
        assert exact or (name in ("downsample", "resize") and 0.4 * total < answer.n_keep < total / 2)
        if isinstance(pruner, DecoderPruner):
            assert per_layer[0] == pruner.n_entering(total, answer.n_keep) > per_layer[-1]
        else:
            assert per_layer == [answer.n_keep] * adapter.n_layers
