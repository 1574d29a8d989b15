"""Every published method against an independent reading of its rule: plain loops, float64.

Features of +1 and -1 in 4^k dimensions make every cosine exact in float32, with plenty of ties; Gaussian have none.
"""

import math

import pytest
import torch

from mipruner.features import Features
from mipruner.pruners import (
    CDPruner,
    DivPruner,
    MMTokPruner,
    TrimTokenatorPruner,
    VisionZipPruner,
    VisPruner,
)

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


# ------------------------------------------------------------------------------------------------------------- MMTok


def mmtok(text, visual, hidden, n_keep, tau_text=0.02, tau_visual=0.2):
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
        kept.append(first_max(gain, [j for j in range(len(columns)) if j not in kept]))
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


def test_mmtok_keeps_a_piece_of_a_word_that_looks_like_a_stop_word():
    sample = features(5, n_text=3, words=[" the", "at", "re"])
    assert MMTokPruner().content(sample).tolist() == [True, True, True]


def test_mmtok_leaves_padding_out():
    valid = torch.tensor([k % 3 > 0 for k in range(60)])
    sample = features(60, d=32, valid=valid)
    inside = valid.nonzero()[:, 0]
    expected = inside[mmtok(sample.text, sample.visual[inside], sample.hidden[inside], 11)].tolist()
    assert MMTokPruner()(sample, 11).indices.tolist() == expected
    kept = MMTokPruner()(sample, 45).indices
    assert set(inside.tolist()) < set(kept.tolist())
    assert kept.unique().numel() == 45


# ----------------------------------------------------------------------------------------------------- TrimTokenator


def trimtokenator(visual, text, n_keep, multiple=2):
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
    expected = trimtokenator(sample.visual, sample.text, n_keep)
    assert TrimTokenatorPruner()(sample, n_keep).indices.tolist() == expected


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
