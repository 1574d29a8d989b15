"""Triton kernels of `mipruner.fused`: from tokens to selected indices, for batches of unequal lengths.

    similarity   rho of eq. 15, for T = V and for T = the text
    log_sums     log-sum-exp of every row of rho over the image: the denominators of eq. 16 for T = V
    relevance    softmax over the text, its marginal over the image and the maximum of the PMI, eq. 16-19
    greedy       all picks of eq. 22-24 in one launch
    partition    log-sum-exp of rho over a vocabulary that is never stored, for `pmi.log_partition`

Only rho has n_visual^2 elements (1 GiB at 16,384 tokens). p, PMI and redundancy are never stored. In a batch of unequal
lengths, tokens of a sample beyond its ``n_visual`` and ``n_text`` are padding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mipruner.errors import InputError
from mipruner.selection import greedy

MAX_VISUAL = 16384
"""Largest number of visual tokens: one program of the greedy kernel holds them in registers."""

PROGRAMS = 1024
"""Target number of programs for `log_partition`."""


@triton.jit  # type: ignore[untyped-decorator]
def similarity_kernel(  # type: ignore[no-untyped-def]
    rho,  # [B, R, N]
    rows,  # [B, R, D]
    columns,  # [B, N, D]
    row_norm,  # [B, R]
    column_norm,  # [B, N]
    n_rows,  # [B]
    n_columns,  # [B]
    R,
    N,
    D,
    tau,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of rho, eq. 15.

    If rows and columns are the same tokens, a tile below the diagonal also fills its mirror image.
    """
    sample = tl.program_id(2).to(tl.int64)
    first_row, first_column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    if (first_row >= tl.load(n_rows + sample)) | (first_column >= tl.load(n_columns + sample)):
        return
    if SYMMETRIC & (first_row < first_column):
        return
    row = (first_row + tl.arange(0, BLOCK)).to(tl.int64)
    column = (first_column + tl.arange(0, BLOCK)).to(tl.int64)
    is_row, is_column = row < R, column < N
    dot = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        is_d = d < D
        a = tl.load(rows + (sample * R + row[:, None]) * D + d, mask=is_row[:, None] & is_d, other=0.0)
        b = tl.load(columns + (sample * N + column[:, None]) * D + d, mask=is_column[:, None] & is_d, other=0.0)
        dot = tl.dot(a, tl.trans(b), dot, input_precision="ieee")
    norms = (
        tl.load(row_norm + sample * R + row, mask=is_row, other=1.0)[:, None]
        * tl.load(column_norm + sample * N + column, mask=is_column, other=1.0)[None, :]
    )
    tile = dot / norms / tau
    rho += sample * R * N
    tl.store(rho + row[:, None] * N + column[None, :], tile, mask=is_row[:, None] & is_column[None, :])
    if SYMMETRIC & (first_row > first_column):
        tl.store(rho + column[:, None] * N + row[None, :], tl.trans(tile), mask=is_column[:, None] & is_row[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def log_sums_kernel(  # type: ignore[no-untyped-def]
    lse,  # [B, N]
    rho,  # [B, N, N]
    n_visual,  # [B]
    N,
    BLOCK: tl.constexpr,
):
    """log sum_j exp(rho_ij) with a running maximum and a running sum, one program per row."""
    sample, row = tl.program_id(1).to(tl.int64), tl.program_id(0)
    n = tl.load(n_visual + sample).to(tl.int32)
    if row >= n:
        return
    rho += (sample * N + row) * N
    highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = tl.load(rho + j, mask=j < n, other=float("-inf"))
        top = tl.maximum(highest, x)
        finite = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(highest - finite) + tl.exp(x - finite)
        highest = top
    top = tl.max(highest, 0)
    tl.store(lse + sample * N + row, top + tl.log(tl.sum(total * tl.exp(highest - top), 0)))


@triton.jit  # type: ignore[untyped-decorator]
def partition_kernel(  # type: ignore[no-untyped-def]
    lse,  # [n_parts, R]
    rows,  # [R, D]
    columns,  # [N, D]
    row_norm,  # [R]
    R,
    N,
    D,
    part,
    tau,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """log sum_j exp(rho_ij) of BLOCK rows over ``part`` columns. Column norms are computed from the same loads."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    is_row = row < R
    first = tl.program_id(1) * part
    scale = 1 / (tau * tl.load(row_norm + row, mask=is_row, other=1.0))
    highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(first, min(first + part, N), BLOCK):
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        is_column = column < N
        dot = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        for start_d in range(0, D, BLOCK_D):
            d = start_d + tl.arange(0, BLOCK_D)
            is_d = d < D
            a = tl.load(rows + row[:, None] * D + d, mask=is_row[:, None] & is_d, other=0.0)
            b = tl.load(columns + column[:, None] * D + d, mask=is_column[:, None] & is_d, other=0.0)
            dot = tl.dot(a, tl.trans(b), dot, input_precision="ieee")
            wide = b.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
        norm = tl.maximum(tl.sqrt(squares), 1e-12)
        x = tl.where(is_column[None, :], dot / norm[None, :] * scale[:, None], float("-inf"))
        top = tl.maximum(highest, tl.max(x, 1))
        total = total * tl.exp(highest - top) + tl.sum(tl.exp(x - top[:, None]), 1)
        highest = top
    tl.store(lse + tl.program_id(1).to(tl.int64) * R + row, highest + tl.log(total), mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def relevance_kernel(  # type: ignore[no-untyped-def]
    relevance,  # [B, N]
    rho,  # [B, M, N]
    n_visual,  # [B]
    n_text,  # [B]
    N,
    M,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """S_cross of eq. 19, one program per sample: all visual tokens at once, a few text tokens at a time."""
    sample = tl.program_id(0).to(tl.int64)
    n, m = tl.load(n_visual + sample).to(tl.int32), tl.load(n_text + sample).to(tl.int32)
    i = tl.arange(0, BLOCK)[None, :]
    inside = i < n
    rho += sample * M * N
    highest = tl.full((1, BLOCK), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1, BLOCK), dtype=tl.float32)
    for start in range(0, m, CHUNK):
        j = start + tl.arange(0, CHUNK)[:, None]
        x = tl.load(rho + j * N + i, mask=(j < m) & inside, other=float("-inf"))
        x = tl.where(inside, x, 0.0)
        top = tl.maximum(highest, tl.max(x, 0, keep_dims=True))
        total = total * tl.exp(highest - top) + tl.sum(tl.exp(x - top), 0, keep_dims=True)
        highest = top
    lse = highest + tl.log(total)
    best = tl.full((1, BLOCK), float("-inf"), dtype=tl.float32)
    for start in range(0, m, CHUNK):
        j = start + tl.arange(0, CHUNK)[:, None]
        log_p = tl.load(rho + j * N + i, mask=(j < m) & inside, other=float("-inf")) - lse
        top = tl.max(log_p, 1, keep_dims=True)
        top = tl.where(j < m, top, 0.0)
        mass = tl.where(j < m, tl.sum(tl.exp(log_p - top), 1, keep_dims=True), 1.0)
        pmi = log_p - (top + tl.log(mass) - tl.log(n.to(tl.float32)))
        best = tl.maximum(best, tl.max(pmi, 0, keep_dims=True))
    tl.store(relevance + sample * N + i, best, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def greedy_kernel(  # type: ignore[no-untyped-def]
    picks,  # [B, G + K]
    relevance,  # [B, N]
    rho,  # [B, N, N]
    lse,  # [B, N]
    given,  # [B, G]
    n_visual,  # [B]
    n_keep,  # [B]
    N,
    G,
    K,
    lam,
    BLOCK: tl.constexpr,
):
    """Greedy search, one program per sample. After a pick j, row j of rho updates the running maximum of eq. 20."""
    sample = tl.program_id(0).to(tl.int64)
    n = tl.load(n_visual + sample).to(tl.int32)
    i = tl.arange(0, BLOCK)
    inside = i < n
    rho += sample * N * N
    score = tl.where(inside, lam * tl.load(relevance + sample * N + i, mask=inside, other=0.0), float("-inf"))
    offset = tl.load(lse + sample * N + i, mask=inside, other=0.0) - tl.log(n.to(tl.float32))
    gain = score + (1 - lam) * offset
    running = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for k in range(G + tl.load(n_keep + sample).to(tl.int32)):
        pick = tl.minimum(tl.argmax(score, 0), n - 1).to(tl.int64)  # NaN loses to padding
        if k < G:
            pick = tl.load(given + sample * G + k)
        tl.store(picks + sample * (G + K) + k, pick)
        running = tl.maximum(running, tl.load(rho + pick * N + i, mask=inside, other=0.0))
        gain = tl.where(i == pick, float("-inf"), gain)
        score = gain - (1 - lam) * running


def _one_program(n: int) -> dict[str, int]:
    """Launch options of a program that holds n elements: at most 16 per thread."""
    block = triton.next_power_of_2(n)
    return {"BLOCK": block, "num_warps": min(32, max(4, block // 512))}


def _norm(tokens: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32).clamp_min(1e-12)


def _operands(*tokens: Tensor) -> list[Tensor]:
    """Operands for `tl.dot`: of one dtype, with at most 32 bits."""
    dtypes = {x.dtype for x in tokens}
    as_is = len(dtypes) == 1 and dtypes <= {torch.float32, torch.float16, torch.bfloat16}
    return [(x if as_is else x.float()).contiguous() for x in tokens]


def _similarity(
    rows: Tensor,
    columns: Tensor,
    row_norm: Tensor,
    column_norm: Tensor,
    n_rows: Tensor,
    n_columns: Tensor,
    tau: float,
) -> Tensor:
    """rho [B, R, N] of the tokens [B, R, d] and [B, N, d]."""
    (B, R, D), N = rows.shape, columns.shape[1]
    rho = torch.empty(B, R, N, device=rows.device)
    block = 128 if min(R, N) >= 2048 else 64
    grid = (triton.cdiv(R, block), triton.cdiv(N, block), B)
    similarity_kernel[grid](
        rho,
        rows,
        columns,
        row_norm,
        column_norm,
        n_rows,
        n_columns,
        R,
        N,
        D,
        tau,
        SYMMETRIC=rows is columns,
        BLOCK=block,
        BLOCK_D=16384 // (block * rows.element_size()),
        num_warps=block // 16,
    )
    return rho


def log_partition(visual: Tensor, vocabulary: Tensor, tau: float) -> Tensor:
    """`pmi.log_partition` [R] of visual tokens [R, d] over a vocabulary [N, d]."""
    (R, D), N = visual.shape, len(vocabulary)
    visual, vocabulary = _operands(visual, vocabulary)
    block = 64 if visual.dtype == torch.float32 else 128
    n_blocks = triton.cdiv(N, block)
    part = triton.cdiv(n_blocks, max(1, PROGRAMS // triton.cdiv(R, block))) * block
    lse = torch.empty(triton.cdiv(N, part), R, device=visual.device)
    partition_kernel[(triton.cdiv(R, block), len(lse))](
        lse,
        visual,
        vocabulary,
        _norm(visual),
        R,
        N,
        D,
        part,
        tau,
        BLOCK=block,
        BLOCK_D=32 if visual.dtype == torch.float32 else 64,
        num_warps=block // 16,
    )
    return lse.logsumexp(0)


def mi_picks(
    visual: Tensor,
    text: Tensor,
    n_keep: int | Tensor,
    lam: float,
    tau: float = 0.1,
    *,
    given: Tensor | None = None,
    relevance: Tensor | None = None,
    n_visual: Tensor | None = None,
    n_text: Tensor | None = None,
) -> Tensor:
    """Greedy picks of a batch, see `mipruner.fused.mi_picks`. The host waits only if ``n_keep`` is a tensor.

    Parameters
    ----------
    visual : Tensor [B, N, d] with N <= `MAX_VISUAL`
    text : Tensor [B, M, d]
    n_keep : int, or Tensor [B]
    given : Tensor [B, n_given] of int64, optional
    relevance : Tensor [B, N] of float32, optional
        S_cross to use instead of eq. 19. The text is then not read.
    n_visual, n_text : Tensor [B], optional
        Number of tokens of each sample without padding.

    Returns
    -------
    Tensor [B, max n_keep]
        Indices in the order of the picks, then -1 if a sample has fewer picks.

    Raises
    ------
    InputError
        If there are more than `MAX_VISUAL` visual tokens.
    """
    B, N, _ = visual.shape
    if N > MAX_VISUAL:
        raise InputError(f"the kernels hold at most {MAX_VISUAL} visual tokens, not {N}")
    device, M = visual.device, text.shape[1]
    K = n_keep if isinstance(n_keep, int) else int(n_keep.max())

    def lengths(n: int | Tensor) -> Tensor:
        return torch.full((B,), n, device=device) if isinstance(n, int) else n.to(device, torch.long).contiguous()

    n_keep, n_visual = lengths(n_keep), lengths(N if n_visual is None else n_visual)
    visual, text = _operands(visual, text)
    norm = _norm(visual)
    if relevance is None:
        n_text = lengths(M if n_text is None else n_text)
        relevance = torch.full((B, N), -torch.inf, device=device)
        rho = _similarity(text, visual, _norm(text), norm, n_text, n_visual, tau)
        whole = _one_program(N)
        chunk = max(1, 4096 // whole["BLOCK"])
        relevance_kernel[(B,)](relevance, rho, n_visual, n_text, N, M, CHUNK=chunk, **whole)
    if lam == 1:
        picks = greedy(relevance, None, K, 1, given=given)
        return picks.masked_fill(torch.arange(K, device=device) >= n_keep[:, None], -1)
    relevance = relevance.float().contiguous()
    rho, lse = _similarity(visual, visual, norm, norm, n_visual, n_visual, tau), torch.empty_like(relevance)
    log_sums_kernel[(N, B)](lse, rho, n_visual, N, BLOCK=min(1024, triton.next_power_of_2(N)))
    given = torch.empty(B, 0, dtype=torch.long, device=device) if given is None else given.contiguous()
    G = given.shape[1]
    picks = torch.full((B, G + K), -1, device=device)
    greedy_kernel[(B,)](picks, relevance, rho, lse, given, n_visual, n_keep, N, G, K, float(lam), **_one_program(N))
    return picks[:, G:]
