"""The fused picks against the plain path, against a float64 reading of the equations, and on exact ties."""

import math
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mipruner import fused, pmi, product
from mipruner.features import Features
from mipruner.fused import mi_picks, row_norm, similarities, with_text
from mipruner.product import PANEL, PANEL_16
from mipruner.pruners import MIPruner
from mipruner.selection import greedy

SHAPES = [(2, 1, 3), (7, 2, 5), (37, 3, 41), (64, 9, 128), (123, 20, 123), (129, 1, 96), (577, 6, 64)]
"""(n_visual, n_text, d), with remainders on every side of a panel."""


def tokens(n_visual, n_text, d, *, seed=0, dtype=torch.float32, distinct=None):
    """Correlated random tokens, as the projector's are; the visual ones repeat if fewer are ``distinct``."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(d, generator=generator)
    visual = torch.randn(distinct or n_visual, d, generator=generator) + 0.5 * base
    if distinct:
        visual = visual[torch.arange(n_visual)[torch.randperm(n_visual, generator=generator)] % distinct]
    return visual.to(dtype), (torch.randn(n_text, d, generator=generator) + 0.5 * base).to(dtype)


def reference(visual, text, n_keep, lam, tau=0.1, given=None):
    return greedy(pmi.relevance(visual, text, tau), pmi.redundancy(visual, tau), n_keep, lam, given=given)


def regrets(visual, text, picks, lam, tau=0.1):
    """How far each pick's gain, eq. 22, lies below the best of its step: eq. 15-24 in float64."""
    visual, text = visual.double(), text.double()
    unit, unit_text = (x / x.norm(dim=1, keepdim=True) for x in (visual, text))
    p_text, p_self = ((unit @ other.T / tau).exp() for other in (unit_text, unit))
    p_text, p_self = p_text / p_text.sum(1, keepdim=True), p_self / p_self.sum(1, keepdim=True)
    relevance = (p_text / p_text.mean(0)).log().amax(1)
    pmi_self = (p_self * len(visual)).log()
    regrets = []
    for k, pick in enumerate(picks):
        gain = lam * relevance - (1 - lam) * (pmi_self[:, picks[:k]].amax(1) if k else 0)
        gain[picks[:k]] = -math.inf
        regrets.append(float(gain.max() - gain[pick]))
    return regrets


def assert_same_picks(picks, visual, text, lam, tau=0.1):
    """Equal to the plain path up to the first step whose best two gains are the same number in float32."""
    expected = reference(visual, text, len(picks), lam, tau)
    if not torch.equal(picks, expected):
        assert len(set(picks.tolist())) == len(picks)
        rounding = 4e-6 / tau
        assert max(regrets(visual, text, expected.tolist(), lam, tau)) < rounding, "the plain path itself is wrong"
        assert max(regrets(visual, text, picks.tolist(), lam, tau)) < rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_picks_as_the_plain_path(shape, lam, dtype):
    visual, text = tokens(*shape, dtype=dtype)
    for tau in (0.1, 0.01):
        for n_keep in {1, shape[0] // 3, shape[0]}:
            assert_same_picks(mi_picks(visual, text, n_keep, lam, tau), visual, text, lam, tau)


@pytest.mark.parametrize("seed", range(20))
def test_exactly_the_plain_picks_at_the_sizes_that_are_used(seed):
    """576 tokens, 64 kept: no step of these is closer than rounding, so nothing but equality will do."""
    visual, text = tokens(576, 12, 64, seed=seed)
    picks = mi_picks(visual, text, 64, 0.5)
    assert max(regrets(visual, text, picks.tolist(), 0.5)) < 4e-5
    assert torch.equal(picks, reference(visual, text, 64, 0.5))


@pytest.fixture(params=["gemm", "zen", "plain"])
def way(request, monkeypatch):
    """Each way of multiplying, on any CPU."""
    with monkeypatch.context() as tiles:
        tiles.setattr(product, "HAS_TILES", True)
        by_mkl = product.gemm.__wrapped__()
    if request.param == "gemm" and by_mkl is None:
        pytest.skip("this build of torch has no such gemm")
    monkeypatch.setattr(product, "gemm", lambda: by_mkl if request.param == "gemm" else None)
    monkeypatch.setattr(product, "ON_ZEN", request.param == "zen")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        (64, 1, 48),
        (2 * PANEL - 1, 4, 41),
        (2 * PANEL + 1, 1, 320),
        (2 * PANEL_16 - 1, 2, 33),
        (577, 7, 96),
        (576, 2, 4096),
        (2049, 3, 64),
        (129, 20, 1024),
    ],
)
def test_equal_tokens_tie_exactly_and_the_lowest_index_wins(shape, dtype, way, monkeypatch):
    monkeypatch.setattr(product, "TILE", 1000)
    distinct = shape[0] // 3
    visual, text = tokens(*shape, distinct=distinct, dtype=dtype)
    rho = similarities(visual, 0.1)
    assert torch.equal(rho, rho.T)
    copies = [(visual == row).all(1).nonzero().flatten() for row in visual.float().unique(dim=0)]
    assert len(copies) == distinct
    for copy in copies:
        assert (rho[copy] == rho[copy[0]]).all()
    order = mi_picks(visual, text, shape[0], 0.5)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    assert all((rank[copy].diff() > 0).all() for copy in copies)
    if shape[0] < 1000:
        assert_same_picks(order, visual, text, 0.5)


def test_bfloat16_tokens_are_multiplied_exactly(way):
    """Only sums round: unit tokens in bfloat16 would be wrong by 1e-3."""
    visual, text = tokens(576, 12, 1024, dtype=torch.bfloat16)
    unit, unit_text = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (visual, text))
    rho, rho_text = similarities(visual, 1.0), with_text(visual, text, 1.0)
    assert rho.dtype == torch.float32
    assert (rho - unit @ unit.T).abs().max() < 2e-6
    assert (rho_text - unit @ unit_text.T).abs().max() < 2e-6
    assert torch.equal(mi_picks(visual, text, 64, 0.5), reference(visual, text, 64, 0.5))


def test_tokens_of_any_strides_and_sizes(way):
    wide = tokens(40, 1, 96, dtype=torch.bfloat16)[0]
    for rows in (wide, wide[:, :31], wide[::3], wide[:, ::2], wide.T, wide[:1], wide[:1].expand(5, 96), wide[:0]):
        for columns in (rows, rows.contiguous(), rows.float(), rows[:1], rows[:0]):
            whole = torch.full((len(rows), len(columns) + 2), 7.0)
            product.multiply(rows, columns, whole[:, 1:-1])
            torch.testing.assert_close(whole[:, 1:-1].double(), rows.double() @ columns.double().T, rtol=0, atol=1e-4)
            assert (whole[:, [0, -1]] == 7).all()


@pytest.mark.parametrize("part", ["no AMX", "no MKL", "no library", "no symbol", "64-bit integers"])
def test_tokens_are_converted_where_the_gemm_is_missing(part, monkeypatch):
    monkeypatch.setattr(product, "HAS_TILES", part != "no AMX")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: part != "no MKL")
    of_other_integers = SimpleNamespace(cblas_gemm_bf16bf16f32=FunctionOfOtherIntegers())
    libraries = {"no library": OSError, "no symbol": [object()], "64-bit integers": [of_other_integers]}
    if part in libraries:
        monkeypatch.setattr(product.ctypes, "CDLL", Mock(side_effect=libraries[part]))
    assert product.gemm.__wrapped__() is None


class FunctionOfOtherIntegers:
    """Returns without a result, as MKL does when it misreads a stride."""

    def __call__(self, *_):
        pass


def test_16_bit_tokens_are_never_all_in_float32(way, monkeypatch):
    """Beside rho there is never a second matrix of its size, nor a float32 copy of tokens that come in 16 bits."""
    monkeypatch.setattr(product, "TILE", 256)
    monkeypatch.setattr(fused, "ENTRIES", 64 * 4500)
    largest = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, list | tuple) else [out]:
                if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                    largest.append(x.untyped_storage().nbytes())
            return out

    visual, text = tokens(4500, 3, 256, dtype=torch.bfloat16)
    known = {visual.untyped_storage().data_ptr(), text.untyped_storage().data_ptr()}
    with Largest():
        mi_picks(visual, text, 3, 0.5)
    rho, *others = sorted(set(largest), reverse=True)
    assert rho == 4 * 4500**2
    assert others[0] <= max(8 * product.TILE**2, 2 * product.TILE * 256 * 4, fused.ENTRIES * 4) < 4500 * 256 * 4


def test_tokens_all_equal_are_picked_in_order():
    visual, text = torch.ones(70, 8), torch.eye(3, 8)
    assert mi_picks(visual, text, 70, 0.5).tolist() == list(range(70))


def test_zero_tokens_stay_finite():
    visual, text = tokens(80, 3, 16)
    visual[::7] = 0
    assert torch.equal(mi_picks(visual, text, 40, 0.5, 0.01), reference(visual, text, 40, 0.5, 0.01))


def test_the_whole_selection_costs_no_more_than_the_product_that_the_equations_ask_for():
    """CPU time of one thread; it is 0.8 to 0.9, and more while other processes use the same cache."""
    visual, text = tokens(576, 20, 4096)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = [math.inf, math.inf]
    for _ in range(20):
        for k, run in enumerate((lambda: visual @ visual.T, lambda: mi_picks(visual, text, 64, 0.5))):
            start = time.process_time()
            run()
            best[k] = min(best[k], time.process_time() - start)
    torch.set_num_threads(threads)
    assert best[1] < 1.1 * best[0]


@pytest.mark.parametrize("run", [lambda rows: mi_picks(rows, rows[:9], 16, 0.5), lambda rows: similarities(rows, 0.1)])
def test_tokens_that_are_the_first_columns_of_longer_rows_cost_what_a_copy_costs(run):
    """Qwen3-VL's rows in vLLM are such; oneDNN alone takes 100 times as long. CPU time."""
    slices = tokens(144, 1, 1280)[0][:, :320]
    best, found = [math.inf, math.inf], [torch.empty(0), torch.empty(0)]
    for _ in range(5):
        for k, rows in enumerate((slices.contiguous(), slices)):
            start = time.process_time()
            found[k] = run(rows)
            best[k] = min(best[k], time.process_time() - start)
    assert torch.equal(*found)
    assert best[1] < 5 * best[0]


@pytest.mark.parametrize("batch", [(3,), (2, 2)])
@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_batches_and_tokens_given(batch, lam):
    samples = [tokens(90, 4, 24, seed=s) for s in range(math.prod(batch))]
    visual = torch.stack([v for v, _ in samples]).view(*batch, 90, 24)
    text = torch.stack([t for _, t in samples]).view(*batch, 4, 24)
    given = torch.stack([torch.tensor([50, 3, s, 89, 40 + s, 17]) for s in range(len(samples))]).view(*batch, 6)
    picks = mi_picks(visual, text, 20, lam, given=given)
    assert torch.equal(picks, reference(visual, text, 20, lam, given=given))
    assert not (picks[..., None] == given[..., None, :]).any()
    with pytest.raises(ValueError, match="cannot pick 85 of 84"):
        mi_picks(visual, text, 85, lam, given=given)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_relevance_from_elsewhere(lam):
    visual, text = tokens(150, 5, 32)
    relevance = torch.randn(150, generator=torch.Generator().manual_seed(3))
    expected = greedy(relevance, pmi.redundancy(visual), 40, lam)
    assert torch.equal(mi_picks(visual, text, 40, lam, relevance=relevance), expected)
    batch = mi_picks(visual.expand(2, 150, 32), text.expand(2, 5, 32), 40, lam, relevance=relevance.expand(2, 150))
    assert torch.equal(batch, expected.expand(2, 40))


@pytest.mark.parametrize("n_rows", [None, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.017, 0.016, 0.01])
def test_the_sum_over_a_vocabulary(tau, dtype, n_rows, way, monkeypatch):
    monkeypatch.setattr(fused, "WORDS", 64)
    visual, vocabulary = tokens(50, 301, 40, dtype=dtype)
    visual[::7], vocabulary[::5] = 0, 0
    expected = pmi.log_partition(visual.double(), vocabulary.double(), tau, n_rows)
    for norm in (None, row_norm(vocabulary)):
        found = fused.log_partition(visual, vocabulary, tau, n_rows, norm=norm)
        torch.testing.assert_close(found, expected, atol=1e-6 / tau, rtol=1e-6)
    found = fused.log_partition(visual[torch.arange(150) % 50], vocabulary, tau, n_rows)
    assert torch.equal(found[:50], found[50:100]) and torch.equal(found[:50], found[100:])  # equal tokens tie exactly
    together = fused.log_partition(visual.expand(2, 50, 40), vocabulary, tau, n_rows)
    torch.testing.assert_close(together, expected.expand(2, 50, 1), atol=1e-6 / tau, rtol=1e-6)


def test_no_copy_of_a_vocabulary_is_made():
    """Of 152,000 words in bfloat16 it would be 2.5 GB in float32; a block of `WORDS` is 16 MB."""
    visual, vocabulary = tokens(20, 5 * fused.WORDS, 16, dtype=torch.bfloat16)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal largest
            out = operation(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Sizes():
        fused.log_partition(visual, vocabulary)
    assert 0 < largest <= 4 * fused.WORDS * max(visual.shape)


def test_what_an_image_says_by_itself_is_computed_once(monkeypatch):
    """Other questions about it, budgets and lam read what is held; another tau, vocabulary, n_rows not."""
    calls = Counter()
    for name in ("_similarities", "log_partition"):
        plain = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, f=plain, n=name, **k: (calls.update([n]), f(*a, **k))[1])
    visual, vocabulary = tokens(90, 300, 120)
    held = {}

    def ask(words, n_keep=20, visual=visual, held=held, vocabulary=vocabulary, **options):
        features = Features(visual, vocabulary[words], vocabulary=vocabulary, held=held)
        pruner = MIPruner(**{"support": "vocabulary"} | options)
        picks = pruner.picks(features, n_keep)
        assert torch.equal(picks, pruner.picks(replace(features, held=None), n_keep))
        return calls - seen

    seen = Counter()
    assert ask([3, 4]) == {"_similarities": 2, "log_partition": 2}  # once for the comparison that holds nothing
    for words, options in (([7], {}), ([8, 9, 10], {"lam": 0.8}), ([8], {"n_keep": 60})):
        seen = calls.copy()
        assert ask(words, **options) == {"_similarities": 1, "log_partition": 1}
    for options in ({"tau": 0.2}, {"tau": 0.2, "vocabulary_rows": 100}, {"vocabulary": vocabulary.clone()}):
        seen = calls.copy()
        assert ask([3, 4], **options)["log_partition"] == 2
    vocabulary.mul_(torch.rand(300, 1) + torch.rand(300, 120))
    seen = calls.copy()
    assert ask([3, 4])["log_partition"] == 2
    wide = tokens(121, 1, 120)[0]
    ask([3], visual=wide, held=(large := {}))
    assert not any(key[0] == "rho" for key in large)  # more tokens than they are wide: rho is larger than they are


def test_a_further_question_costs_a_third_of_the_product():
    """CPU time of one thread, with lam 0.5 over a vocabulary; it is 0.2 of the product."""
    visual, vocabulary = tokens(576, 500, 4096, dtype=torch.bfloat16)
    norm, held, wide = row_norm(vocabulary), {}, visual.float()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = [math.inf, math.inf]

    def ask(k):
        features = Features(visual, vocabulary[k : k + 20], vocabulary=vocabulary, vocabulary_norm=norm, held=held)
        MIPruner(0.5, support="vocabulary").select(features, 64)

    ask(0)
    for k in range(1, 9):
        for place, run in enumerate((lambda: wide @ wide.T, lambda k=k: ask(k))):
            start = time.process_time()
            run()
            best[place] = min(best[place], time.process_time() - start)
    torch.set_num_threads(threads)
    assert best[1] < 0.33 * best[0]
