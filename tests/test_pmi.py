"""Eq. 15-21 and 52-53 against loops written from the paper in float64, their properties, and extreme values.

The two options beyond the paper, a normalisation over the vocabulary and a prior, are read the same way.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mipruner import pmi

NORMALIZATIONS = ["softmax", "minmax", "minmax_exact"]
SHAPES = [(7, 3, 5), (5, 1, 4), (1, 4, 3), (30, 11, 16), (2, 2, 1)]
"""(n_visual, n_text, d)"""


def tokens(n_visual, n_text, d, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_visual + n_text, d, generator=generator).to(dtype)
    return rows[:n_visual], rows[n_visual:]


# -------------------------------------------------------------------------------------------- the paper, term by term


def eq15(visual, other, tau):
    """rho, as nested lists."""

    def unit(x):
        length = math.sqrt(sum(a * a for a in x))
        return [a / length for a in x] if length else x

    rows, columns = ([unit(x) for x in tensor.double().tolist()] for tensor in (visual, other))
    return [[sum(a * b for a, b in zip(v, t, strict=True)) / tau for t in columns] for v in rows]


def eq16(rho):
    weights = [[math.exp(x) for x in row] for row in rho]
    return [[w / sum(row) for w in row] for row in weights]


def eq52_53(rho, floor):
    p = []
    for row in rho:
        low, high = min(row), max(row)
        scaled = [(x - low) / (high - low) if high > low else 1.0 for x in row]
        p.append([max(floor, x / sum(scaled)) for x in scaled])
    return p


def conditional(visual, other, tau=0.1, normalization="softmax"):
    """p(x_j | v_i)"""
    rho = eq15(visual, other, tau)
    return eq16(rho) if normalization == "softmax" else eq52_53(rho, 1e-12 if normalization == "minmax" else 0.0)


def eq17(p):
    return [sum(row[j] for row in p) / len(p) for j in range(len(p[0]))]


def eq18(p, marginal):
    return [[math.log(a / b) if a else -math.inf for a, b in zip(row, marginal, strict=True)] for row in p]


def eq19(visual, text, tau, normalization):
    p = conditional(visual, text, tau, normalization)
    return [max(row) for row in eq18(p, eq17(p))]


def eq21(visual, text, tau, normalization):
    p = conditional(visual, text, tau, normalization)
    return [
        sum(a * b for a, b in zip(p_row, row, strict=True) if a) for p_row, row in zip(p, eq18(p, eq17(p)), strict=True)
    ]


def uniform(n):
    return [1 / n] * n


def check(ours, paper):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), torch.tensor(paper, dtype=torch.float64), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_each_equation(shape, tau, normalization):
    visual, text = tokens(*shape)
    check(pmi.similarity(visual, text) / tau, eq15(visual, text, tau))
    p = conditional(visual, text, tau, normalization)
    check(pmi.log_conditional(visual, text, tau, normalization).exp(), p)
    check(pmi.cross_pmi(visual, text, tau, normalization), eq18(p, eq17(p)))
    check(pmi.relevance(visual, text, tau, "max", normalization), eq19(visual, text, tau, normalization))
    check(pmi.relevance(visual, text, tau, "global", normalization), eq21(visual, text, tau, normalization))

    p = conditional(visual, visual, tau, normalization)
    expected = eq18(p, uniform(len(p)))
    check(pmi.self_pmi(visual, tau, normalization), expected)
    check(pmi.redundancy(visual, tau, "max", normalization), expected)
    terms = [[a * b if a else 0.0 for a, b in zip(*rows, strict=True)] for rows in zip(p, expected, strict=True)]
    check(pmi.redundancy(visual, tau, "global", normalization), terms)


def test_a_case_by_hand():
    """Two patches, each one of two words: p = [[s, 1 - s], [1 - s, s]], p(t) = 1/2 and so PMI = log 2 s."""
    visual = text = torch.eye(2)
    s = 1 / (1 + math.exp(-1 / 0.5))
    expected = torch.tensor([[2 * s, 2 - 2 * s], [2 - 2 * s, 2 * s]]).log()
    torch.testing.assert_close(pmi.cross_pmi(visual, text, 0.5), expected)
    torch.testing.assert_close(pmi.self_pmi(visual, 0.5), expected)
    torch.testing.assert_close(pmi.relevance(visual, text, 0.5), torch.full((2,), math.log(2 * s)))


def test_minmax_gives_the_least_similar_word_nothing():
    """Similarities 1, 0 and -1 become 1, 1/2, 0 (eq. 52) and 2/3, 1/3, 0 (eq. 53)."""
    visual, text = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    exact = pmi.log_conditional(visual, text, normalization="minmax_exact")
    torch.testing.assert_close(exact[0, :2].exp(), torch.tensor([2 / 3, 1 / 3]))
    assert exact[0, 2] == -math.inf
    lifted = pmi.log_conditional(visual, text, normalization="minmax")
    assert lifted[0, 2] == pytest.approx(math.log(pmi.MINMAX_FLOOR))


def test_minmax_knows_no_temperature():
    visual, text = tokens(9, 4, 6)
    cold, warm = (pmi.cross_pmi(visual, text, tau, "minmax_exact") for tau in (0.01, 1.0))
    torch.testing.assert_close(cold, warm, atol=1e-4, rtol=1e-4)


def test_self_pmi_has_the_candidate_in_rows():
    """Two near-copies and a loner: the loner's distribution over the others differs from theirs over it."""
    visual = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.6, 0.8]])
    table = pmi.self_pmi(visual)
    assert not torch.allclose(table, table.T)
    torch.testing.assert_close((table.exp() / 3).sum(1), torch.ones(3))


def test_the_marginal_is_read_over_all_visual_tokens():
    """A word that every patch resembles tells patches apart no better than one that none resembles."""
    visual = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, -1.0, 0.0], [1.0, 0.0, -1.0]])
    common, own = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    table = pmi.cross_pmi(visual, torch.cat([common, own]))
    assert table[0].argmax() == 1
    assert pmi.similarity(visual, torch.cat([common, own]))[0].diff() == 0


@pytest.mark.parametrize("unknown", ["mean", ""])
def test_unknown_options_are_named(unknown):
    visual, text = tokens(3, 2, 4)
    with pytest.raises(ValueError, match="choose max or global"):
        pmi.relevance(visual, text, aggregation=unknown)
    with pytest.raises(ValueError, match="choose max or global"):
        pmi.redundancy(visual, aggregation=unknown)
    with pytest.raises(ValueError, match="choose softmax, minmax or minmax_exact"):
        pmi.cross_pmi(visual, text, normalization=unknown)


# --------------------------------------------------------------------------------------------------------- properties

shapes = st.tuples(st.integers(1, 24), st.integers(1, 9), st.integers(1, 12))
seeds = st.integers(0, 10_000)
taus = st.sampled_from([0.01, 0.05, 0.1, 0.5, 2.0])
normalizations = st.sampled_from(NORMALIZATIONS)
fast = settings(max_examples=40, deadline=None, derandomize=True)


@fast
@given(shapes, seeds, taus, normalizations)
def test_rows_sum_to_one_and_the_marginal_too(shape, seed, tau, normalization):
    visual, text = tokens(*shape, seed=seed)
    p = pmi.log_conditional(visual, text, tau, normalization).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(shape[0]))
    marginal = pmi._log_marginal(p.log(), None).exp()
    torch.testing.assert_close(marginal.sum(-1), torch.ones(1))


@fast
@given(shapes, seeds, taus, normalizations)
def test_global_relevance_is_a_divergence(shape, seed, tau, normalization):
    """KL(p(T | v_i) || p(T)) >= 0, and their mean is MI(V; T) <= log min(n_visual, n_text)."""
    visual, text = tokens(*shape, seed=seed)
    divergence = pmi.relevance(visual, text, tau, "global", normalization)
    assert divergence.min() > -1e-5
    assert divergence.mean() < math.log(min(shape[:2])) + 1e-4
    assert (pmi.relevance(visual, text, tau, "max", normalization) > divergence - 1e-4).all()


@fast
@given(shapes, seeds, taus, normalizations)
def test_the_mean_of_the_ratio_is_one(shape, seed, tau, normalization):
    """sum_i p(v_i) p(t | v_i) / p(t) = 1, the law of total probability, eq. 49-51."""
    visual, text = tokens(*shape, seed=seed)
    ratio = pmi.cross_pmi(visual, text, tau, normalization).exp().mean(-2)
    ratio = ratio[ratio > 0]  # minmax_exact: a word that is every patch's least similar one has probability 0
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=1e-4)


@fast
@given(shapes, seeds, normalizations, st.sampled_from(["max", "global"]))
def test_renaming_tokens_renames_scores(shape, seed, normalization, aggregation):
    visual, text = tokens(*shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    v, t = (torch.randperm(n, generator=generator) for n in shape[:2])
    options = {"normalization": normalization, "tau": 0.1}
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(
        pmi.cross_pmi(visual[v], text[t], **options), pmi.cross_pmi(visual, text, **options)[v][:, t], **close
    )
    torch.testing.assert_close(pmi.self_pmi(visual[v], **options), pmi.self_pmi(visual, **options)[v][:, v], **close)
    options["aggregation"] = aggregation
    torch.testing.assert_close(
        pmi.relevance(visual[v], text[t], **options), pmi.relevance(visual, text, **options)[v], **close
    )


@fast
@given(shapes, seeds, normalizations)
def test_lengths_do_not_matter(shape, seed, normalization):
    visual, text = tokens(*shape, seed=seed)
    scales = 10 ** torch.empty(shape[0] + shape[1], 1).uniform_(-3, 3, generator=torch.Generator().manual_seed(seed))
    stretched = pmi.cross_pmi(visual * scales[: shape[0]], text * scales[shape[0] :], 0.1, normalization)
    torch.testing.assert_close(stretched, pmi.cross_pmi(visual, text, 0.1, normalization), atol=2e-4, rtol=2e-4)


@fast
@given(shapes, seeds, st.sampled_from(NORMALIZATIONS[:2]), st.sampled_from(["max", "global"]))
def test_a_batch_is_its_samples(shape, seed, normalization, aggregation):
    samples = [tokens(*shape, seed=seed + k) for k in range(6)]
    visual, text = (torch.stack(x).view(3, 2, *x[0].shape) for x in zip(*samples, strict=True))
    close = {"atol": 1e-4, "rtol": 1e-4}
    for k, (v, t) in enumerate(samples):
        at = divmod(k, 2)
        for batch, alone in (
            (pmi.cross_pmi(visual, text, 0.1, normalization), pmi.cross_pmi(v, t, 0.1, normalization)),
            (pmi.self_pmi(visual, 0.1, normalization), pmi.self_pmi(v, 0.1, normalization)),
            (
                pmi.relevance(visual, text, 0.1, aggregation, normalization),
                pmi.relevance(v, t, 0.1, aggregation, normalization),
            ),
        ):
            torch.testing.assert_close(batch[at], alone, **close)


# ----------------------------------------------------------------------------------- beyond the paper: the vocabulary


def over_vocabulary(visual, text, vocabulary, tau):
    """p(t_j | v_i) = exp(rho_ij) / sum_w exp(rho_iw) with w over the vocabulary."""
    weights = [[math.exp(x) for x in row] for row in eq15(visual, text, tau)]
    sums = [sum(math.exp(x) for x in row) for row in eq15(visual, vocabulary, tau)]
    return [[w / total for w in row] for row, total in zip(weights, sums, strict=True)]


@pytest.mark.parametrize("block", [1, 7, 4096])
@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_vocabulary(tau, block, monkeypatch):
    monkeypatch.setattr(pmi, "BLOCK", block)
    visual, vocabulary = tokens(9, 30, 8)
    text = vocabulary[[4, 17, 4]]
    p = over_vocabulary(visual, text, vocabulary, tau)
    partition = pmi.log_partition(visual, vocabulary, tau)
    assert partition.shape == (9, 1)
    check(pmi.log_conditional(visual, text, tau, log_partition=partition).exp(), p)
    table = eq18(p, eq17(p))
    check(pmi.cross_pmi(visual, text, tau, log_partition=partition), table)
    check(pmi.relevance(visual, text, tau, log_partition=partition), [max(row) for row in table])
    terms = [sum(a * b for a, b in zip(*rows, strict=True)) for rows in zip(p, table, strict=True)]
    check(pmi.relevance(visual, text, tau, "global", log_partition=partition), terms)


def test_a_vocabulary_of_the_prompt_s_words_is_the_prompt():
    visual, text = tokens(20, 6, 8)
    partition = pmi.log_partition(visual, text)
    torch.testing.assert_close(pmi.cross_pmi(visual, text, log_partition=partition), pmi.cross_pmi(visual, text))


def test_a_patch_of_something_else_is_no_longer_forced_onto_the_prompt():
    """A patch of grass is no more about "sun" than about "the"; over these two it must choose, over all words not."""
    sun, the, grass = torch.eye(3)
    visual, text = torch.stack([sun, 0.1 * sun + grass]), torch.stack([sun, the])
    prompt = pmi.relevance(visual, text)
    vocabulary = pmi.relevance(visual, text, log_partition=pmi.log_partition(visual, torch.eye(3)))
    assert vocabulary.diff() < prompt.diff() - 1


def test_the_sum_over_a_sample_of_the_vocabulary_is_unbiased():
    visual, vocabulary = tokens(40, 4000, 16)
    exact = pmi.log_partition(visual, vocabulary)
    assert torch.equal(pmi.log_partition(visual, vocabulary, n_rows=4000), exact)
    terms = (pmi.similarity(visual, vocabulary) / 0.1).exp()
    spread = (terms.std(-1) / terms.mean(-1)).mean()
    for n_rows in (500, 2000):
        estimate = pmi.log_partition(visual, vocabulary, n_rows=n_rows)
        assert torch.equal(estimate, pmi.log_partition(visual, vocabulary, n_rows=n_rows))
        error = (estimate - exact).square().mean().sqrt()
        expected = spread * math.sqrt((1 - n_rows / 4000) / n_rows)
        assert 0.4 * expected < error < 2 * expected


def test_similarities_to_the_whole_vocabulary_never_exist():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if x.untyped_storage().data_ptr() != vocabulary.untyped_storage().data_ptr():
                    self.numel = max(self.numel, x.numel())
            return out

    visual, vocabulary = tokens(64, 3 * pmi.BLOCK + 5, 8)
    with Largest() as largest:
        pmi.log_partition(visual, vocabulary)
    assert largest.numel == 64 * pmi.BLOCK


def test_minmax_knows_no_vocabulary():
    visual, text = tokens(4, 2, 3)
    with pytest.raises(ValueError, match="no normalization but softmax"):
        pmi.cross_pmi(visual, text, 0.1, "minmax", log_partition=pmi.log_partition(visual, text))


# --------------------------------------------------------------------------------------- beyond the paper: the prior


def weighted(p, prior):
    """Eq. 50."""
    return [sum(w * row[j] for w, row in zip(prior, p, strict=True)) for j in range(len(p[0]))]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_prior(normalization):
    visual, text = tokens(8, 4, 6)
    prior = torch.tensor([4.0, 1, 1, 2, 9, 3, 1, 5]) / 26
    w = prior.tolist()
    p = conditional(visual, text, 0.1, normalization)
    table = eq18(p, weighted(p, w))
    check(pmi.cross_pmi(visual, text, 0.1, normalization, prior=prior), table)
    check(pmi.relevance(visual, text, 0.1, "max", normalization, prior=prior), [max(row) for row in table])
    joint = [[8 * share * x for x in row] for share, row in zip(w, p, strict=True)]
    terms = [sum(a * b for a, b in zip(*rows, strict=True) if a) for rows in zip(joint, table, strict=True)]
    check(pmi.relevance(visual, text, 0.1, "global", normalization, prior=prior), terms)

    p = conditional(visual, visual, 0.1, normalization)
    table = eq18(p, w)
    check(pmi.self_pmi(visual, 0.1, normalization, prior=prior), table)
    check(pmi.redundancy(visual, 0.1, "max", normalization, prior=prior), table)
    joint = [[8 * share * x for x in row] for share, row in zip(w, p, strict=True)]
    terms = [[a * b if a else 0.0 for a, b in zip(*rows, strict=True)] for rows in zip(joint, table, strict=True)]
    check(pmi.redundancy(visual, 0.1, "global", normalization, prior=prior), terms)


@pytest.mark.parametrize("aggregation", ["max", "global"])
def test_a_uniform_prior_is_the_paper(aggregation):
    visual, text = tokens(30, 5, 8)
    prior = torch.full((30,), 1 / 30)
    close = {"atol": 1e-5, "rtol": 1e-5}
    ours, paper = (pmi.relevance(visual, text, 0.1, aggregation, prior=p) for p in (prior, None))
    torch.testing.assert_close(ours, paper, **close)
    ours, paper = (pmi.redundancy(visual, 0.1, aggregation, prior=p) for p in (prior, None))
    torch.testing.assert_close(ours, paper, **close)


# ----------------------------------------------------------------------------------------------------- extreme values

ODD = {
    "random": lambda v, t: (v, t),
    "one word": lambda v, t: (v, t[:1]),
    "one patch": lambda v, t: (v[:1], t),
    "identical patches": lambda v, t: (v[:1].expand_as(v), t),
    "identical words": lambda v, t: (v, t[:1].expand_as(t)),
    "everything identical": lambda v, t: (v[:1].expand_as(v), v[:1].expand_as(t)),
    "a zero patch": lambda v, t: (torch.cat([torch.zeros_like(v[:1]), v[1:]]), t),
    "a zero word": lambda v, t: (v, torch.cat([torch.zeros_like(t[:1]), t[1:]])),
    "all zero": lambda v, t: (torch.zeros_like(v), torch.zeros_like(t)),
    "opposite": lambda v, t: (v, -v[: len(t)]),
    "long": lambda v, t: (v * 6e4 / v.abs().amax(), t),
    "short": lambda v, t: (v * 1e-6, t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("odd", ODD)
def test_extreme_values_stay_finite(odd, dtype):
    visual, text = ODD[odd](*tokens(40, 6, 24))
    visual, text = visual.to(dtype), text.to(dtype)
    for tau in (0.01, 0.1):
        for normalization in NORMALIZATIONS:
            for aggregation in ("max", "global"):
                relevance = pmi.relevance(visual, text, tau, aggregation, normalization)
                assert relevance.dtype == torch.float32
                assert relevance.isfinite().all()
                redundancy = pmi.redundancy(visual, tau, aggregation, normalization)
                if (aggregation, normalization) == ("max", "minmax_exact"):
                    assert not redundancy.isnan().any() and (redundancy < math.inf).all()
                else:
                    assert redundancy.isfinite().all()


def test_tokens_that_say_nothing_score_nothing():
    """One word, equal patches or equal words: every p(t | v) is p(t), so PMI is 0."""
    visual, text = tokens(40, 6, 24)
    for v, t in ((visual, text[:1]), (visual[:1].expand_as(visual), text), (visual, text[:1].expand_as(text))):
        for normalization in NORMALIZATIONS:
            assert pmi.relevance(v, t, 0.01, "max", normalization).abs().max() < 1e-4
            assert pmi.relevance(v, t, 0.01, "global", normalization).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    visual, text = tokens(50, 5, 32, dtype=dtype)
    assert torch.equal(pmi.cross_pmi(visual, text, 0.01), pmi.cross_pmi(visual.float(), text.float(), 0.01))
    assert torch.equal(pmi.self_pmi(visual, 0.01), pmi.self_pmi(visual.float(), 0.01))


@pytest.mark.parametrize("tau", [0.01, 0.1])
def test_small_temperatures_keep_their_digits(tau):
    """exp(100) overflows float32 when squared: the logarithm of the softmax must not be taken of the softmax."""
    visual, text = tokens(60, 8, 3)
    check(pmi.relevance(visual, text, tau), eq19(visual, text, tau, "softmax"))
