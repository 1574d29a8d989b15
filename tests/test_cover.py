"""CoverPruner: its objective by brute force, the bound of the greedy search, the lazy search against the dense one."""

from itertools import combinations

import pytest
import torch

from mipruner.features import Features
from mipruner.pruners.cover import CERTAIN, Coverage, CoverPruner, cover
from mipruner.selection import dense_greedy, lazy_greedy


def draw(seed, n=9, n_text=3, n_words=20, width=8, copies=1):
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(n, width, generator=generator).repeat_interleave(copies, 0)
    text = torch.randn(n_text, width, generator=generator)
    vocabulary = torch.cat([text, torch.randn(n_words, width, generator=generator)])
    return Features(visual=visual, text=text, vocabulary=vocabulary)


def value(features, chosen, lam, tau=0.1):
    """f(S) of a set, in float64 and by loops, from the definition alone."""
    unit = [
        x.double() / x.double().norm(dim=-1, keepdim=True)
        for x in (features.visual, features.text, features.vocabulary)
    ]
    visual, text, vocabulary = unit
    says = ((visual @ text.T) / tau).exp() / ((visual @ vocabulary.T) / tau).exp().sum(1, keepdim=True)
    says = says.clamp_max(CERTAIN)
    shows = ((visual @ visual.T) / tau).softmax(1)

    def words(members):
        total = 0.0
        for t in range(len(text)):
            silent = 1.0
            for v in members:
                silent *= 1 - float(says[v, t])
            total += 1 - silent
        return total

    def image(members):
        return sum(max((float(shows[v, u]) for v in members), default=0.0) for u in range(len(visual)))

    every = range(len(visual))
    return lam * words(chosen) / words(every) + (1 - lam) * image(chosen) / image(every)


@pytest.mark.parametrize("lam", [0, 0.3, 0.65, 1])
@pytest.mark.parametrize("seed", range(3))
def test_each_pick_adds_most_to_the_objective(lam, seed):
    features = draw(seed)
    picks = CoverPruner(lam=lam).order(features, 5).tolist()
    for k, pick in enumerate(picks):
        values = {v: value(features, [*picks[:k], v], lam) for v in range(9) if v not in picks[:k]}
        assert values[pick] >= max(values.values()) - 1e-6
    assert CoverPruner(lam=lam)(features, 5).indices.tolist() == sorted(picks)


@pytest.mark.parametrize("seed", range(5))
def test_the_objective_is_monotone_and_submodular(seed):
    features, lam = draw(seed, n=6), 0.65
    values = {s: value(features, s, lam) for size in range(7) for s in combinations(range(6), size)}
    assert values[()] == 0
    assert values[tuple(range(6))] == pytest.approx(1)
    for small, one in values.items():
        for v in set(range(6)) - set(small):
            more = values[tuple(sorted((*small, v)))] - one
            assert more >= -1e-12
            for u in set(range(6)) - {v, *small}:
                larger = tuple(sorted((*small, u)))
                assert values[tuple(sorted((*larger, v)))] - values[larger] <= more + 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_the_greedy_set_reaches_its_share_of_the_optimum(seed):
    features, lam = draw(seed), 0.65
    reached = value(features, CoverPruner(lam=lam).order(features, 3).tolist(), lam)
    best = max(value(features, chosen, lam) for chosen in combinations(range(9), 3))
    assert (1 - 1 / torch.e) * best <= reached <= best + 1e-9


@pytest.mark.parametrize("lam", [0, 0.65, 1])
@pytest.mark.parametrize("copies", [1, 2, 7])
@pytest.mark.parametrize("seed", range(4))
def test_the_lazy_search_makes_the_picks_of_the_dense_one_also_on_ties(lam, copies, seed):
    features = draw(seed, n=40, copies=copies)
    pruner = CoverPruner(lam=lam)
    lazy = pruner.order(features, 30)
    n = len(features.visual)
    says = ((features.visual / features.visual.norm(dim=1, keepdim=True)) @ features.text.T).sigmoid()
    shows = (features.visual @ features.visual.T).softmax(-1)
    f = Coverage(says, shows, lam)
    assert cover(says, shows, 30, lam).tolist() == dense_greedy(f.gains, f.add, 30).tolist()
    assert len(set(lazy.tolist())) == 30 and max(lazy.tolist()) < n


def test_equal_tokens_are_picked_by_index():
    says, shows = torch.full((50, 3), 0.25), torch.full((50, 50), 0.02)
    assert cover(says, shows, 50, 0.65).tolist() == list(range(50))


def test_a_batch_is_its_samples():
    samples = [draw(seed, n=30) for seed in range(3)]
    vocabulary = samples[0].vocabulary
    batch = Features(
        visual=torch.stack([s.visual for s in samples]),
        text=torch.stack([s.text for s in samples]),
        vocabulary=vocabulary,
    )
    alone = [CoverPruner().order(Features(s.visual, s.text, vocabulary=vocabulary), 9) for s in samples]
    assert CoverPruner().order(batch, 9).tolist() == [picks.tolist() for picks in alone]


def test_the_lazy_search_asks_for_few_gains():
    features = draw(0, n=400, width=32)
    asked = []
    says = torch.rand(400, 5, generator=torch.Generator().manual_seed(0)) * 0.5
    shows = (features.visual @ features.visual.T / 4).softmax(-1)
    f = Coverage(says, shows, 0.65)

    def gains(index):
        asked.append(len(index))
        return f.gains(index)

    lazy_greedy(gains, f.add, 400, 60)
    assert sum(asked) < 400 * 60 / 2
