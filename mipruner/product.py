"""Products of tokens on a CPU in float32, by the fastest routine that rounds only sums.

The product of two bfloat16 numbers is exact in float32. So on a CPU with AMX, bfloat16 tokens are multiplied as
bfloat16, by oneMKL's gemm with a float32 result: torch's Linux wheels export it, torch itself has no function for it.
Everywhere else tokens are converted to float32 first, a few rows at a time.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

HAS_TILES = torch.cpu._is_amx_tile_supported()
"""Whether the CPU multiplies bfloat16 by AMX."""

ON_ZEN = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported() and not HAS_TILES
"""Whether oneDNN's float32 product is faster than MKL's, the default of torch: on AMD Zen 4 and 5, found by CPU flags.
"""

PANEL, PANEL_16 = 96, 288
"""Number of columns of a panel in float32, and in bfloat16."""

MANY = 600
"""Number of tokens from which the products of all pairs are computed by halves, recursively, instead of by panels."""

TILE = 2048
"""Number of 16-bit tokens that are converted to float32 at a time for the products of all pairs."""

SQUARE = 256
"""Rows and columns of a block that is transposed at a time."""

FEW = 256
"""Number of tokens converted to float32 at a time if each is read once, into a reused buffer."""


def is_direct(*tokens: Tensor) -> bool:
    """Whether these are multiplied as they are, without a float32 copy."""
    kinds = {x.dtype for x in tokens}
    return kinds == {torch.float32} or (kinds == {torch.bfloat16} and gemm() is not None)


def multiply(rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """Product [n, m] of rows [n, d] and columns [m, d], written to float32 ``out``."""
    if not is_direct(rows, columns):
        columns = columns.float()
        for some, part in zip(rows.split(FEW), out.split(FEW), strict=True):
            multiply(some.float(), columns, part)
    elif rows.dtype == torch.bfloat16 and (of_bfloat16 := gemm()) is not None:
        of_bfloat16(rows, columns, out)
    elif ON_ZEN:  # oneDNN takes 100 times as long for columns that are a slice of longer ones
        out.copy_(torch.ops.mkldnn._linear_pointwise(rows, columns.contiguous(), None, "none", [], ""))
    else:
        torch.mm(rows, columns.T, out=out)


def of_all_pairs(tokens: Tensor, out: Tensor) -> None:
    """Products of the tokens [n, d] with each other, written to float32 ``out`` [n, n]; about one half is mirrored."""
    if is_direct(tokens):
        _half(tokens, out)
        return
    tiles = list(pairwise([*range(0, len(tokens), TILE), len(tokens)]))
    for k, (start, stop) in enumerate(tiles):
        rows = tokens[start:stop].float()
        _half(rows, out[start:stop, start:stop])
        for left, right in tiles[k + 1 :]:
            multiply(rows, tokens[left:right].float(), out[start:stop, left:right])
            _mirror(out[start:stop, left:right], out[left:right, start:stop])


def _half(tokens: Tensor, out: Tensor) -> None:
    n, half = len(tokens), len(tokens) // 2
    panel = PANEL if tokens.dtype == torch.float32 else PANEL_16
    if n < MANY:
        for left, right in pairwise([*range(0, n, panel), n]):
            # Few shapes for all images: oneDNN keeps about 1 MiB for each shape it has met.
            multiply(tokens[:right], tokens[left:right], out[:right, left:right])
            _mirror(out[:left, left:right], out[left:right, :left])
        return
    multiply(tokens[:half], tokens[half:], out[:half, half:])
    _mirror(out[:half, half:], out[half:, :half])
    _half(tokens[:half], out[:half, :half])
    _half(tokens[half:], out[half:, half:])


def _mirror(part: Tensor, into: Tensor) -> None:
    """Write the transpose of ``part`` to ``into``. 4,096 rows at once would take 4 times as long."""
    for rows, columns in zip(part.split(SQUARE), into.split(SQUARE, 1), strict=True):
        for square, target in zip(rows.split(SQUARE, 1), columns.split(SQUARE), strict=True):
            target.copy_(square.T)


Gemm = Callable[[Tensor, Tensor, Tensor], None]


@cache
def gemm() -> Gemm | None:
    """`multiply` for bfloat16 by oneMKL's ``cblas_gemm_bf16bf16f32``. None without AMX, MKL or this symbol."""
    if not (HAS_TILES and torch.backends.mkl.is_available()):
        return None
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    integer, number, address = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    function.restype = None
    function.argtypes = [*[integer] * 6, number, address, integer, address, integer, number, address, integer]
    by_rows, as_it_is, transposed = 101, 111, 112  # CblasRowMajor, CblasNoTrans, CblasTrans

    def multiply(rows: Tensor, columns: Tensor, out: Tensor) -> None:
        a, b = (x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous() for x in (rows, columns))
        shape, steps = (len(a), len(b), a.shape[1]), [max(x.stride(0), x.shape[1]) for x in (a, b, out)]
        addresses = [x.data_ptr() for x in (a, b, out)]
        of_a, of_b, of_out = zip(addresses, steps, strict=True)
        function(by_rows, as_it_is, transposed, *shape, 1.0, *of_a, *of_b, 0.0, *of_out)

    one, result = torch.arange(6, dtype=torch.bfloat16).view(2, 3), torch.zeros(2, 2)
    multiply(one, one, result)
    return multiply if result.tolist() == [[5, 14], [14, 50]] else None  # else the integers of this MKL have 64 bits
