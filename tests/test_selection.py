"""Budgets, top-k and the greedy search of eq. 22-24, against a search that tries every token at every step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mipruner import pmi
from mipruner.selection import Auto, Selection, budget, greedy, split_budget, take_rows, top_k

fast = settings(max_examples=60, deadline=None, derandomize=True)


def algorithm1(relevance, redundancy, n_keep, lam, aggregation="max", given=()):
    """Lines 11-20: at each step the gain of every token that is left, re-read over the whole set. Python floats."""
    chosen, picks = list(given), []
    for _ in range(n_keep):
        gains = {}
        for i in range(len(relevance)):
            if i in chosen:
                continue
            terms = [redundancy[i][j] for j in chosen]
            s_self = (max(terms) if aggregation == "max" else sum(terms)) if terms else 0.0
            gains[i] = lam * relevance[i] - (1 - lam) * s_self
        picks.append(max(gains, key=lambda i: (gains[i], -i)))
        chosen.append(picks[-1])
    return picks


def scores(n, seed=0):
    """Relevance and redundancy in sixteenths, so that every gain is exact in float32 and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-32, 33, (n,), generator=generator) / 16,
        torch.randint(-32, 33, (n, n), generator=generator) / 16,
    )


# ------------------------------------------------------------------------------------------------------------- greedy


@fast
@given(
    st.integers(1, 14),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    st.sampled_from(["max", "global"]),
    st.data(),
)
def test_greedy_is_algorithm_1(n, seed, lam, aggregation, data):
    relevance, redundancy = scores(n, seed)
    given = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n))
    n_keep = data.draw(st.integers(0, n - len(given)))
    expected = algorithm1(relevance.tolist(), redundancy.tolist(), n_keep, lam, aggregation, given)
    index = torch.tensor(given, dtype=torch.long)
    for options in [{"given": index}] if given else [{}, {"given": index}]:
        picks = greedy(relevance, redundancy, n_keep, lam, aggregation=aggregation, **options)
        assert picks.dtype == torch.long
        assert picks.tolist() == expected


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("aggregation", ["max", "global"])
def test_greedy_on_the_method_s_own_scores(lam, aggregation):
    generator = torch.Generator().manual_seed(1)
    visual, text = torch.randn(40, 12, generator=generator), torch.randn(5, 12, generator=generator)
    relevance, redundancy = (
        pmi.relevance(visual, text, aggregation=aggregation),
        pmi.redundancy(visual, aggregation=aggregation),
    )
    expected = algorithm1(relevance.tolist(), redundancy.tolist(), 40, lam, aggregation)
    assert greedy(relevance, redundancy, 40, lam, aggregation=aggregation).tolist() == expected


def test_the_first_pick_reads_relevance_alone():
    """S_self over the empty set is 0, however negative the terms are; and so lam = 0 starts at the lowest index."""
    relevance, redundancy = torch.tensor([0.0, 1.0, 0.5]), torch.full((3, 3), -9.0)
    assert greedy(relevance, redundancy, 1, 0.5).tolist() == [1]
    assert greedy(relevance, redundancy, 1, 0.0).tolist() == [0]


def test_redundancy_is_the_candidate_s_row():
    """Token 1 is redundant given 0 in its own row; that 0 is not so given 1 does not save it."""
    redundancy = torch.tensor([[0.0, 0.0, 0.0], [5.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert greedy(torch.tensor([9.0, 1.0, 1.0]), redundancy, 2, 0.5).tolist() == [0, 2]


def test_max_looks_at_the_nearest_and_global_at_all():
    relevance = torch.tensor([9.0, 8.0, 1.0, 1.0])
    redundancy = torch.zeros(4, 4)
    redundancy[2, :2], redundancy[3, :2] = torch.tensor([2.0, 2.0]), torch.tensor([3.0, 0.0])
    assert greedy(relevance, redundancy, 3, 0.5).tolist() == [0, 1, 2]
    assert greedy(relevance, redundancy, 3, 0.5, aggregation="global").tolist() == [0, 1, 3]


@fast
@given(st.integers(1, 30), st.integers(0, 10_000))
def test_lam_one_is_top_k(n, seed):
    relevance, redundancy = scores(n, seed)
    expected = sorted(range(n), key=lambda i: (-float(relevance[i]), i))
    assert top_k(relevance, n).tolist() == expected
    for n_keep in (0, 1, n // 2, n):
        assert greedy(relevance, redundancy, n_keep, 1.0).tolist() == expected[:n_keep]
        assert greedy(relevance, None, n_keep, 1).tolist() == expected[:n_keep]


@fast
@given(st.integers(1, 30), st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1.0]))
def test_picks_are_unique_in_range_and_the_same_again(n, seed, lam):
    relevance, redundancy = scores(n, seed)
    picks = greedy(relevance, redundancy, n, lam)
    assert sorted(picks.tolist()) == list(range(n))
    assert torch.equal(picks, greedy(relevance, redundancy, n, lam))
    for n_keep in range(n):
        assert torch.equal(greedy(relevance, redundancy, n_keep, lam), picks[:n_keep])


def test_ties_go_to_the_lowest_index():
    relevance, redundancy = torch.zeros(9), torch.zeros(9, 9)
    for lam in (0.0, 0.5, 1.0):
        assert greedy(relevance, redundancy, 9, lam).tolist() == list(range(9))
    assert greedy(relevance, redundancy, 4, 0.5, given=torch.tensor([0, 3])).tolist() == [1, 2, 4, 5]
    assert top_k(torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0]), 4).tolist() == [1, 2, 4, 0]


@pytest.mark.parametrize("given_", [None, [[3, 0], [1, 7]]])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("aggregation", ["max", "global"])
def test_a_batch_is_its_samples(given_, lam, aggregation):
    samples = [scores(8, seed) for seed in range(2)]
    relevance, redundancy = (torch.stack(x) for x in zip(*samples, strict=True))
    options = {"aggregation": aggregation}
    batch = greedy(relevance[None], redundancy[None], 6, lam, given=given_ and torch.tensor(given_)[None], **options)
    assert batch.shape == (1, 2, 6)
    for k, sample in enumerate(samples):
        alone = greedy(*sample, 6, lam, given=given_ and torch.tensor(given_[k]), **options)
        assert torch.equal(batch[0, k], alone)


def test_minus_infinity_is_a_score_like_any_other():
    """minmax_exact: a term of -inf makes a token welcome, a relevance of -inf unwelcome; none is picked twice."""
    relevance, redundancy = scores(6)
    redundancy[1] = redundancy[4] = -math.inf
    picks = greedy(relevance, redundancy, 6, 0.5).tolist()
    assert sorted(picks) == list(range(6))
    assert {1, 4} <= set(picks[:3])
    relevance[2] = -math.inf
    assert greedy(relevance, redundancy, 6, 0.5).tolist()[-1] == 2
    assert sorted(greedy(relevance, redundancy, 6, 0.0).tolist()) == list(range(6))
    assert sorted(greedy(torch.full((6,), -math.inf), None, 6, 1).tolist()) == list(range(6))


@pytest.mark.parametrize("n_keep", [-1, 6])
def test_more_picks_than_tokens(n_keep):
    relevance, redundancy = scores(7)
    with pytest.raises(ValueError, match=f"cannot pick {n_keep} of 5"):
        greedy(relevance, redundancy, n_keep, 0.5, given=torch.tensor([2, 4]))


# ------------------------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    ("keep", "n_visual", "n_keep"),
    [
        (1, 576, 1),
        (1.0, 576, 576),
        (576, 576, 576),
        (0.25, 576, 144),
        (0.25, 10, 2),  # round(2.5): Python rounds halves to even
        (0.35, 10, 4),  # round(3.5)
        (0.5, 1, 1),
        (1e-9, 576, 1),
        (0.0557, 2048, 114),
    ],
)
def test_budget(keep, n_visual, n_keep):
    assert budget(keep, n_visual) == n_keep


@pytest.mark.parametrize("keep", [0, -3, 0.0, -0.5, 1.5, 64.0, 577, math.nan, math.inf, True, None, "16", [16]])
def test_budgets_that_are_none(keep):
    with pytest.raises(ValueError, match="keep="):
        budget(keep, 576)


def fewest(relevance, quality):
    positive = sorted((max(0.0, x) for x in relevance), reverse=True)
    return next(n for n in range(1, len(positive) + 1) if sum(positive[:n]) >= quality * sum(positive) - 1e-6)


@fast
@given(st.lists(st.integers(-16, 64), min_size=1, max_size=40), st.sampled_from([0.01, 0.05, 0.3, 0.77, 1.0]))
def test_auto_keeps_the_fewest_that_hold_the_share(relevance, quality):
    auto = Auto(quality, 1.0)
    if max(relevance) <= 0:
        assert auto.enough(torch.tensor(relevance).float()) == math.ceil(quality * len(relevance))
    else:
        assert auto.enough(torch.tensor(relevance) / 16) == fewest([x / 16 for x in relevance], quality)


def test_auto_by_hand():
    """One token with half of the information, two with a quarter each: and one that misinforms counts for nothing."""
    relevance = torch.tensor([1.0, -3.0, 2.0, 1.0])
    expected = {0.01: 1, 0.5: 1, 0.51: 2, 0.75: 2, 0.76: 3, 1.0: 3}
    assert {q: Auto(q, 64).enough(relevance) for q in expected} == expected


def test_the_budget_of_auto_is_its_maximum():
    assert budget(Auto(0.5, 64), 576) == 64
    assert budget(Auto(0.5, 64), 54) == 54
    assert budget(Auto(0.5, 0.25), 576) == 144
    for quality in (0, 1.1, -1, math.nan):
        with pytest.raises(ValueError, match="quality="):
            Auto(quality, 64)
    for keep_max in (0, True, 1.5, None):
        with pytest.raises(ValueError, match="keep="):
            budget(Auto(0.5, keep_max), 576)


@fast
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=9), st.data())
def test_split_budget(counts, data):
    n_keep = data.draw(st.integers(len(counts), sum(counts)))
    shares = split_budget(n_keep, counts)
    assert sum(shares) == n_keep
    assert all(1 <= share <= count for share, count in zip(shares, counts, strict=True))
    exact = [n_keep * count / sum(counts) for count in counts]
    if min(exact) >= 1:  # nothing is lifted to one, so largest remainder stays within a token of the proportion
        assert all(abs(share - e) < 1 for share, e in zip(shares, exact, strict=True))
        remainders = [e - math.floor(e) for e in exact]
        lifted = [share > math.floor(e) for share, e in zip(shares, exact, strict=True)]
        if any(lifted) and not all(lifted):
            least = min(r for r, up in zip(remainders, lifted, strict=True) if up)
            assert least >= max(r for r, up in zip(remainders, lifted, strict=True) if not up) - 1e-9


def test_split_budget_by_hand():
    assert split_budget(10, [576]) == [10]
    assert split_budget(10, [100, 100, 100]) == [4, 3, 3]
    assert split_budget(3, [1000, 1, 1]) == [1, 1, 1]
    assert split_budget(144, [576, 288]) == [96, 48]
    assert split_budget(7, [4, 2, 1]) == [4, 2, 1]
    with pytest.raises(ValueError, match="2 tokens for 3 images"):
        split_budget(2, [9, 9, 9])


# -------------------------------------------------------------------------------------------------------------- rows


def test_take_rows():
    rows = torch.arange(24.0).view(2, 4, 3)
    index = torch.tensor([[3, 0, 0], [1, 2, 1]])
    assert torch.equal(take_rows(rows, index), torch.stack([rows[0, [3, 0, 0]], rows[1, [1, 2, 1]]]))


def test_rows_that_enter_the_language_model():
    indices = torch.tensor([[0, 4, 5]])
    assert Selection(indices).n_rows == 3
    assert Selection(indices, torch.zeros(1, 4, 8)).n_rows == 4
