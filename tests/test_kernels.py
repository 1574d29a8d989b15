"""The Triton kernels against the plain path: on a GPU as they are, elsewhere through Triton's interpreter."""

import math
import os
import subprocess
import sys

import pytest
import torch

from test_fused import assert_same_picks, reference, tokens

pytest.importorskip("triton", reason="Triton is not available for this platform")
from mipruner import kernels, pmi
from mipruner.fused import mi_picks
from mipruner.selection import greedy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def picks(visual, text, *args, **options):
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return kernels.mi_picks(visual.to(DEVICE), text.to(DEVICE), *args, **options).cpu()


def half_types():
    interpreted = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter cannot multiply bfloat16")
    return [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=interpreted)]


@pytest.mark.parametrize("dtype", half_types())
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(2, 1, 3), (7, 2, 5), (64, 3, 64), (65, 9, 41), (123, 20, 70), (200, 1, 33)])
def test_same_picks_as_the_plain_path(shape, lam, dtype):
    visual, text = tokens(*shape, dtype=dtype)
    for tau in (0.1, 0.01):
        n_keep = (shape[0] + 1) // 2
        assert_same_picks(picks(visual[None], text[None], n_keep, lam, tau)[0], visual, text, lam, tau)


@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_a_ragged_batch_is_its_samples_alone(lam):
    sizes = [(90, 5, 30), (41, 1, 41), (128, 7, 64), (3, 2, 1)]  # n_visual, n_text, n_keep
    samples = [tokens(n, m, 24, seed=n) for n, m, _ in sizes]
    visual = torch.full((4, 128, 24), torch.nan)
    text = torch.full((4, 7, 24), torch.nan)
    for row, (v, t) in enumerate(samples):
        visual[row, : len(v)], text[row, : len(t)] = v, t
    n_visual, n_text, n_keep = torch.tensor(sizes).T
    together = picks(visual, text, n_keep, lam, n_visual=n_visual, n_text=n_text)
    assert together.shape == (4, 64)
    for row, (v, t) in enumerate(samples):
        k = sizes[row][2]
        assert torch.equal(together[row, :k], reference(v, t, k, lam))
        assert (together[row, k:] == -1).all()


@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_tokens_given(lam):
    samples = [tokens(70, 4, 24, seed=s) for s in range(2)]
    visual, text = (torch.stack(x) for x in zip(*samples, strict=True))
    given = torch.tensor([[50, 3, 69], [0, 1, 2]])
    assert torch.equal(picks(visual, text, 20, lam, given=given), reference(visual, text, 20, lam, given=given))


@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_relevance_from_elsewhere(lam):
    visual, text = tokens(70, 4, 24)
    relevance = torch.randn(1, 70, generator=torch.Generator().manual_seed(3))
    expected = greedy(relevance[0], pmi.redundancy(visual), 20, lam)
    assert torch.equal(picks(visual[None], text[None], 20, lam, relevance=relevance)[0], expected)


def test_relevance_of_one_sample_serves_a_batch():
    """Expanded, so that its samples do not lie one after the other in memory."""
    visual, text = tokens(70, 4, 24)
    relevance = torch.randn(1, 70, generator=torch.Generator().manual_seed(3))
    expected = greedy(relevance[0], pmi.redundancy(visual), 20, 0.5)
    batch = picks(visual.expand(2, 70, 24), text.expand(2, 4, 24), 20, 0.5, relevance=relevance.expand(2, 70))
    assert torch.equal(batch, expected.expand(2, 20))


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_dtypes_that_tensor_cores_do_not_take(dtypes):
    visual, text = (x.to(dtype) for x, dtype in zip(tokens(70, 4, 24), dtypes, strict=True))
    assert torch.equal(picks(visual[None], text[None], 20, 0.5)[0], reference(visual, text, 20, 0.5))
    partition = kernels.log_partition(visual.to(DEVICE), text.to(DEVICE), 0.1).cpu()
    torch.testing.assert_close(partition, pmi.log_partition(visual, text)[:, 0], atol=1e-5, rtol=1e-6)


def test_without_numbers_the_picks_stay_in_range(monkeypatch):
    """The engine finds NaN only afterwards. On a GPU the padding wins over it, not so in the interpreter."""
    if DEVICE == "cpu":
        from triton.runtime.interpreter import ReduceOps

        monkeypatch.setattr(ReduceOps, "apply_impl", lambda self, input: self.generic_reduce(input))
    visual = torch.full((5, 16), torch.nan)
    text = tokens(5, 2, 16)[1]
    assert picks(visual[None], text[None], 3, 0.5).max() < 5


@pytest.mark.parametrize("programs", [1, 1024])
@pytest.mark.parametrize("dtype", half_types())
@pytest.mark.parametrize("shape", [(3, 1, 5), (64, 128, 64), (70, 301, 41), (150, 64, 33)])
def test_log_partition(shape, dtype, programs, monkeypatch):
    """One program over all of the vocabulary, or one for each block of it."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    visual, vocabulary = tokens(*shape, dtype=dtype)
    visual[::7], vocabulary[::5] = 0, 0
    for tau in (0.1, 0.01):
        ours = kernels.log_partition(visual.to(DEVICE), vocabulary.to(DEVICE), tau).cpu()
        torch.testing.assert_close(ours, pmi.log_partition(visual, vocabulary, tau)[:, 0], atol=1e-6 / tau, rtol=1e-6)


@pytest.mark.parametrize("shape", [(96, 1, 48), (129, 4, 41)])
def test_equal_tokens_tie_exactly_and_the_lowest_index_wins(shape):
    """Whole numbers, so that the interpreter's products are exact too, whatever the order of their sums."""
    visual, text = (x.mul(2).round() for x in tokens(*shape, distinct=shape[0] // 3))
    order = picks(visual[None], text[None], shape[0], 0.5)[0]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    copies = [(visual == row).all(1).nonzero().flatten() for row in visual.unique(dim=0)]
    assert len(copies) == shape[0] // 3
    assert all((rank[copy].diff() > 0).all() for copy in copies)
    assert_same_picks(order, visual, text, 0.5)


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_tokens_on_a_gpu_take_the_kernels(batch, monkeypatch):
    visual, text = tokens(math.prod(batch) * 33, math.prod(batch) * 4, 16)
    visual, text = visual.view(*batch, 33, 16), text.view(*batch, 4, 16)
    given = torch.tensor([2, 32]).expand(*batch, 2)
    expected = reference(visual, text, 9, 0.5, given=given)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    calls = []
    monkeypatch.setattr(kernels, "mi_picks", lambda *a, _run=kernels.mi_picks, **k: calls.append(1) or _run(*a, **k))
    visual, text, given = visual.to(DEVICE), text.to(DEVICE), given.to(DEVICE)
    assert torch.equal(mi_picks(visual, text, 9, 0.5, given=given).cpu(), expected)
    assert calls == [1]


def test_more_tokens_than_a_program_holds():
    with pytest.raises(ValueError, match="at most 16384"):
        picks(torch.empty(1, 16385, 1), torch.empty(1, 1, 1), 4, 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("n_visual", [576, 2304, 16384])
def test_large_images(n_visual):
    visual, text = tokens(n_visual, 20, 512, dtype=torch.bfloat16)
    expected = reference(visual.to(DEVICE), text.to(DEVICE), n_visual // 8, 0.5).cpu()
    same = (picks(visual[None], text[None], n_visual // 8, 0.5)[0] == expected).float().mean()
    assert same == 1


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mipruner import kernels, pmi

def compile(kernel, dtype, warps, **constants):
    kinds = {"rows": dtype, "columns": dtype, "picks": "i64", "given": "i64", "tau": "fp32", "lam": "fp32"}
    floats = "rho row_norm column_norm lse relevance".split()
    lengths = "n_rows n_columns n_visual n_text n_keep".split()
    kinds |= dict.fromkeys(floats, "fp32") | dict.fromkeys(lengths, "i64")
    pointers = {"rows", "columns", "picks", "given", *floats, *lengths}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = kinds.get(name, "i32")
        signature[name] = "constexpr" if name in constants else "*" + kind if name in pointers else kind
        if name in pointers or name in ("R", "N", "D"):
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert compiled.metadata.shared <= 227 * 1024
    print(kernel.__name__, dtype, "wgmma" in compiled.asm["ptx"])

for dtype in ("bf16", "fp16", "fp32"):
    for block in (64, 128):
        depth = 16384 // (block * (4 if dtype == "fp32" else 2))
        compile(kernels.similarity_kernel, dtype, block // 16, SYMMETRIC=True, BLOCK=block, BLOCK_D=depth)
    wide = dtype != "fp32"
    compile(kernels.partition_kernel, dtype, 8 if wide else 4, BLOCK=128 if wide else 64, BLOCK_D=64 if wide else 32)
compile(kernels.log_sums_kernel, "", 4, BLOCK=1024)
compile(kernels.relevance_kernel, "", 4, BLOCK=1024, CHUNK=4)
compile(kernels.relevance_kernel, "", 32, BLOCK=16384, CHUNK=1)
compile(kernels.greedy_kernel, "", 32, BLOCK=16384)
"""


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    """Types and shapes hold for sm_90 in every dtype, and 16-bit tiles reach its tensor cores."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "similarity_kernel bf16 True",
        "similarity_kernel bf16 True",
        "partition_kernel bf16 True",
        "similarity_kernel fp16 True",
        "similarity_kernel fp16 True",
        "partition_kernel fp16 True",
        "similarity_kernel fp32 False",
        "similarity_kernel fp32 False",
        "partition_kernel fp32 False",
        "log_sums_kernel  False",
        "relevance_kernel  False",
        "relevance_kernel  False",
        "greedy_kernel  False",
    ]
