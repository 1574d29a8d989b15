"""Every pruner before the language model by the same rules, and the paper's own four against their definitions."""

import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mipruner import pmi
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.models import Prompt, load
from mipruner.prior import visual_prior
from mipruner.pruners import (
    PRUNERS,
    AttentionPruner,
    MIAttentionPruner,
    MIPruner,
    NoPruner,
    Pruner,
    RandomPruner,
    SimilarityPruner,
)
from mipruner.selection import greedy, top_k

N_VISUAL, D = 48, 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = [
    MIPruner(lam=lam, tau=tau, aggregation=aggregation, normalization=normalization)
    for lam, tau, aggregation, normalization in [
        (0.0, 0.1, "max", "softmax"),
        (1.0, 0.1, "max", "softmax"),
        (0.8, 0.01, "max", "softmax"),
        (0.5, 0.1, "global", "softmax"),
        (1.0, 0.1, "global", "minmax"),
        (0.5, 0.1, "max", "minmax"),
        (0.5, 0.1, "max", "minmax_exact"),
    ]
]
BEYOND = [
    MIPruner(0.8, support="vocabulary"),
    MIPruner(1.0, aggregation="global", support="vocabulary", vocabulary_rows=20),
    MIPruner(0.5, prior="center"),
    MIPruner(0.5, aggregation="global", support="vocabulary", prior="thirds"),
    MIPruner(0.5, prior="estimated", prior_table=[[1, 2, 1], [3, 9, 0.5]]),
    MIAttentionPruner(0.8, support="vocabulary", prior="center"),
]
EVERY = [make() for make in PRUNERS.values() if issubclass(make, Pruner)] + VARIANTS + BEYOND
BY_TENSOR = ("visual", "text", "attention", "attention_to_self", "hidden", "cls_hidden", "keys", "question", "valid")

every_pruner = pytest.mark.parametrize("pruner", EVERY, ids=repr)


def sample(name="a", n_visual=N_VISUAL, n_text=5, dtype=torch.float32, seed=0):
    """Everything that any method reads, as a CLIP-like encoder gives it."""
    generator = torch.Generator().manual_seed(seed)

    def rows(n, d=D):
        return torch.randn(n, d, generator=generator).to(dtype)

    return Features(
        visual=rows(n_visual),
        text=rows(n_text),
        grid=(n_visual // 6, 6),
        attention=torch.rand(n_visual, generator=generator),
        attention_to_self=None,
        hidden=rows(n_visual),
        cls_hidden=rows(1),
        keys=rows(n_visual, 8),
        project=torch.nn.functional.gelu,
        clip_visual=rows(n_visual, 16),
        clip_text=rows(1, 16),
        words=[" What", " color", " is", " the", " sun"][:n_text],
        vocabulary=torch.randn(60, D, generator=torch.Generator().manual_seed(99)).to(dtype),
        question=torch.ones(n_text, dtype=torch.bool),
        valid=torch.ones(n_visual, dtype=torch.bool),
        sample=name,
    )


def fills(pruner, selection, n_keep):
    """Whether the budget is what enters; of a method whose rows may not fit, at most that."""
    if isinstance(pruner, NoPruner):
        return selection.n_rows == N_VISUAL
    return selection.n_rows == n_keep or (pruner.at_most and 1 <= selection.n_rows < n_keep)


@every_pruner
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_comes_out(pruner, dtype):
    """Exactly n_keep rows, at indices that are ascending, unique and in range; the same when asked again."""
    features = sample(dtype=dtype)
    for n_keep in (1, 2, 7, 24, N_VISUAL - 1, N_VISUAL):
        selection = pruner(features, n_keep)
        indices = selection.indices.tolist()
        assert fills(pruner, selection, n_keep)
        assert selection.indices.dtype == torch.long
        assert indices == sorted(set(indices))
        assert set(indices) <= set(range(N_VISUAL))
        again = pruner(sample(dtype=dtype), n_keep)
        assert again.indices.tolist() == indices
        if selection.embeds is not None:
            assert selection.embeds.shape[-1] == D
            assert selection.embeds.isfinite().all()
            assert torch.equal(again.embeds, selection.embeds)


@every_pruner
def test_keeping_all_changes_nothing(pruner):
    selection = pruner(sample(), N_VISUAL)
    assert selection.indices.tolist() == list(range(N_VISUAL))
    assert selection.embeds is None and selection.merge is None


@every_pruner
def test_a_batch_is_its_samples(pruner):
    """Leading dimensions are samples that know nothing of each other."""
    samples = [sample("a", seed=seed) for seed in range(6)]
    stacked = {
        name: torch.stack([getattr(s, name) for s in samples]).unflatten(0, (3, 2))
        for name in BY_TENSOR
        if getattr(samples[0], name) is not None
    }
    words = [[s.words for s in samples[k : k + 2]] for k in (0, 2, 4)]
    batch = replace(samples[0], words=words, clip_visual=None, clip_text=None, **stacked)
    if isinstance(pruner, RandomPruner):
        pytest.skip("draws by the sample's name, and a batch has one name")
    for n_keep in (1, 9, N_VISUAL):
        indices = pruner(batch, n_keep).indices
        for k, alone in enumerate(samples):
            alone = replace(alone, clip_visual=None, clip_text=None)
            assert indices[divmod(k, 2)].tolist() == pruner(alone, n_keep).indices.tolist()


@every_pruner
@pytest.mark.parametrize("n_text", [1, 5])
def test_identical_and_zero_tokens(pruner, n_text):
    same = sample(n_text=n_text)
    same = replace(
        same,
        visual=same.visual[:1].expand(N_VISUAL, D),
        hidden=same.hidden[:1].expand(N_VISUAL, D),
        keys=same.keys[:1].expand(N_VISUAL, 8),
        attention=torch.zeros(N_VISUAL),
    )
    zero = replace(same, visual=torch.zeros(N_VISUAL, D), text=torch.zeros(n_text, D), hidden=torch.zeros(N_VISUAL, D))
    for features in (same, zero):
        for n_keep in (1, 13, N_VISUAL - 1):
            selection = pruner(features, n_keep)
            assert fills(pruner, selection, n_keep)
            assert selection.indices.unique().tolist() == selection.indices.tolist()


@every_pruner
def test_the_first_picks_of_an_order_are_the_choice_of_that_budget(pruner):
    features = sample()
    order = pruner.order(features, N_VISUAL - 1)
    nested = {"random", "similarity", "attention", "mi", "divprune", "cdpruner", "mmtok", "cover"}
    assert order is not None or type(pruner) not in [PRUNERS[name] for name in nested]
    if order is not None:
        for n in range(1, N_VISUAL):
            assert order[:n].sort().values.equal(pruner(features, n).indices)
            assert pruner.order(features, n).equal(order[:n])


@every_pruner
@pytest.mark.parametrize("n_keep", [0, -1, N_VISUAL + 1])
def test_a_budget_out_of_range(pruner, n_keep):
    if isinstance(pruner, NoPruner):
        pytest.skip("keeps everything, whatever the budget")
    with pytest.raises(InputError, match=f"cannot keep {n_keep} of {N_VISUAL} visual tokens"):
        pruner(sample(), n_keep)


@every_pruner
def test_bad_features(pruner):
    if isinstance(pruner, NoPruner):
        pytest.skip("reads no feature")
    good = sample()
    silent = replace(good, text=good.text[:0])
    if pruner.reads_text:
        with pytest.raises(InputError, match="the question is empty"):
            pruner(silent, 5)
    else:
        assert pruner(silent, 5).indices.tolist() == pruner(good, 5).indices.tolist()
    for name in ("visual", "text"):
        for value in (math.nan, math.inf, -math.inf):
            rows = getattr(good, name).clone()
            rows[-1, -1] = value
            with pytest.raises(InputError, match="NaN or infinity"):
                pruner(replace(good, **{name: rows}), 5)
    for name in pruner.needs:
        with pytest.raises(InputError, match=f"{type(pruner).__name__} needs {name}"):
            pruner(replace(good, **{name: None}), 5)


def test_large_finite_features_are_not_taken_for_infinite():
    features = sample(dtype=torch.float32)
    features = replace(features, visual=features.visual.sign() * 3e38)
    assert MIPruner()(features, 5).n_rows == 5


@every_pruner
def test_a_method_is_a_value(pruner):
    """Equal hyperparameters are equal pruners, whose repr is the recipe; nothing is changed in place."""
    assert replace(pruner) == pruner
    assert eval(repr(pruner), {type(pruner).__name__: type(pruner)}) == pruner
    with pytest.raises(FrozenInstanceError):
        pruner.lam = 0.3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MIPruner(lam=1.1), "lam=1.1"),
        (lambda: MIPruner(lam=math.nan), "lam=nan"),
        (lambda: MIPruner(tau=0), "tau=0"),
        (lambda: MIAttentionPruner(split=-0.1), "split=-0.1"),
        (lambda: MIPruner(support="words"), "choose prompt, vocabulary"),
        (lambda: MIPruner(support="vocabulary", vocabulary_rows=0), "vocabulary_rows=0"),
        (lambda: MIPruner(tau=math.inf), "tau=inf is not positive and finite"),
        (lambda: MIPruner(aggregation="mean"), "unknown aggregation 'mean': choose max, global"),
        (lambda: MIPruner(normalization="l1"), "unknown normalization 'l1': choose softmax, minmax, minmax_exact"),
        (lambda: MIPruner(support="vocabulary", normalization="minmax")(sample(), 3), "normalization but softmax"),
        (lambda: MIPruner(prior="golden"), "choose uniform, center, thirds, estimated"),
        (lambda: MIPruner(prior="estimated"), "needs prior_table"),
        (lambda: MIPruner(prior="estimated", prior_table=[[1, 0]]), "rows of positive weights"),
    ],
)
def test_hyperparameters_out_of_range(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ------------------------------------------------------------------------------------------ the paper's own, one by one


@pytest.mark.parametrize("pruner", [p for p in EVERY if type(p) is MIPruner], ids=repr)
def test_mi_is_the_greedy_search_over_pmi(pruner):
    features = sample()
    options = (pruner.tau, pruner.aggregation, pruner.normalization)
    prior = partition = None
    if pruner.prior != "uniform":
        prior = visual_prior(pruner.prior, features.grid, pruner.prior_table)
    if pruner.support == "vocabulary":
        partition = pmi.log_partition(features.visual, features.vocabulary, pruner.tau, pruner.vocabulary_rows)
    relevance = pmi.relevance(features.visual, features.text, *options, log_partition=partition, prior=prior)
    redundancy = pmi.redundancy(features.visual, *options, prior=prior)
    for n_keep in (1, 10, 30):
        expected = greedy(relevance, redundancy, n_keep, pruner.lam, aggregation=pruner.aggregation)
        assert pruner(features, n_keep).indices.tolist() == sorted(expected.tolist())


def test_only_what_is_asked_for_is_read():
    assert MIPruner().signals == set()
    assert MIAttentionPruner().signals == {"attention"}
    assert MIPruner(support="vocabulary").signals == {"vocabulary"}
    assert MIAttentionPruner(prior="thirds", support="vocabulary").signals == {"attention", "vocabulary", "grid"}


def test_an_adapter_hands_out_the_language_model_s_vocabulary():
    adapter = load(Path(__file__).parent.parent / "experiments/demo/llava", dtype="float32")
    image = Image.new("RGB", (336, 336), (90, 120, 150))
    visuals = adapter.encode([adapter.preprocess(image)])
    prompt = Prompt("What color is the sun ?", [image])
    features = adapter.read(prompt, visuals, MIPruner(support="vocabulary").signals).features()[0]
    assert features.vocabulary is adapter.model.get_input_embeddings().weight
    words = adapter.tokenizer("What color is the sun ?", add_special_tokens=False)["input_ids"]
    assert torch.equal(features.text, features.vocabulary[words])
    assert adapter.read(prompt, visuals, MIPruner().signals).features()[0].vocabulary is None


def test_mi_reads_the_question():
    features = sample()
    other = replace(features, text=sample(seed=9).text)
    assert MIPruner(lam=1.0)(features, 9).indices.tolist() != MIPruner(lam=1.0)(other, 9).indices.tolist()
    assert MIPruner(lam=0.0)(features, 9).indices.tolist() == MIPruner(lam=0.0)(other, 9).indices.tolist()


def test_mi_ignores_lengths():
    features = sample()
    longer = replace(features, visual=features.visual * 8, text=features.text / 4)  # powers of two: exact
    for lam in (0.0, 0.5, 1.0):
        assert MIPruner(lam)(features, 9).indices.tolist() == MIPruner(lam)(longer, 9).indices.tolist()


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("split", "n_attended"), [(0.0, 0), (0.25, 2), (0.5, 5), (1.0, 10)])
def test_mi_attention_adds_mi_to_attention(lam, split, n_attended):
    features = sample()
    kept = MIAttentionPruner(lam, split=split)(features, 10).indices
    attended = features.attention.argsort(descending=True)[:n_attended]
    added = greedy(
        pmi.relevance(features.visual, features.text),
        pmi.redundancy(features.visual),
        10 - n_attended,
        lam,
        given=attended if n_attended else None,
    )
    assert kept.tolist() == sorted([*attended.tolist(), *added.tolist()])


def test_similarity_keeps_what_resembles_any_word():
    features = sample()
    cosine = torch.nn.functional.cosine_similarity(features.visual[:, None], features.text[None], dim=-1)
    expected = sorted(range(N_VISUAL), key=lambda i: -max(cosine[i].tolist()))[:7]
    assert SimilarityPruner()(features, 7).indices.tolist() == sorted(expected)


def test_attention_keeps_what_is_attended_to():
    features = replace(sample(), attention=torch.arange(N_VISUAL).float() % 7)
    assert AttentionPruner()(features, 4).indices.tolist() == [6, 13, 20, 27]


def test_random_depends_on_seed_and_name_alone():
    features = sample()
    draws = {seed: tuple(RandomPruner(seed)(features, 16).indices.tolist()) for seed in range(20)}
    assert len(set(draws.values())) == 20
    assert RandomPruner(3)(sample(seed=8), 16).indices.tolist() == list(draws[3])
    assert RandomPruner(3)(sample("b"), 16).indices.tolist() != list(draws[3])
    assert set(RandomPruner(3)(features, 17).indices.tolist()) > set(draws[3])
    counts = torch.zeros(N_VISUAL)
    for k in range(600):
        counts[RandomPruner(0)(sample(f"sample {k}"), 16).indices] += 1
    expected, spread = 600 / 3, math.sqrt(600 * (1 / 3) * (2 / 3))
    assert (counts - expected).abs().max() < 5 * spread


def test_top_k_prefers_the_first_of_equals():
    features = replace(sample(), attention=torch.ones(N_VISUAL))
    assert AttentionPruner()(features, 3).indices.tolist() == top_k(torch.ones(N_VISUAL), 3).tolist() == [0, 1, 2]
