"""Kernels `down` (slot rows times their expert's matrix), `combine`, `combine_residual` (sums).

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen.
"""

import triton
import triton.language as tl

from d2m.kernels.up import gathered_matmul


@triton.jit
def down(
    a,
    w,
    tile_expert,
    tile_rows,
    out,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [slots, OUTER] = a [slots, INNER] times w[expert], [INNER, OUTER] or its transpose.

    Forward: hidden times W2. Backward: the gradient of the hidden rows times W1 transposed. Grid:
    tiles * ceil(OUTER / BLOCK_N), column tiles side by side. Rows of unused tiles stay unwritten.
    """
    n_tiles: tl.constexpr = (OUTER + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // n_tiles
    if tl.load(tile_rows + tile) == 0:
        return
    expert = tl.load(tile_expert + tile).to(tl.int64)
    slot = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = gathered_matmul(
        a,
        w + expert * INNER * OUTER,
        slot,
        columns,
        1 if TRANSPOSED else OUTER,
        INNER if TRANSPOSED else 1,
        INNER,
        OUTER,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
    ).to(out.dtype.element_ty)
    at = out + slot[:, None] * OUTER + columns[None, :]
    if OUTER % BLOCK_N == 0:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=columns[None, :] < OUTER)


@triton.jit
def token_sum(rows, slots, token, columns, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum of rows [slots, D] over a token's K slots, in float32, k = 0 first."""
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for k in tl.static_range(K):
        at = rows + tl.load(slots + token * K + k).to(tl.int64) * D + columns
        if D % BLOCK_D == 0:
            total += tl.load(at).to(tl.float32)
        else:
            total += tl.load(at, mask=columns < D, other=0.0).to(tl.float32)
    return total


@triton.jit
def combine(rows, slots, y, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """y [T, D] = the sum of rows [slots, D] over a token's K slots.

    A gather instead of atomics: the same bits on every run. Grid: (T, ceil(D / BLOCK_D)).
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = token_sum(rows, slots, token, columns, D, K, BLOCK_D)
    at = y + token * D + columns
    if D % BLOCK_D == 0:
        tl.store(at, total.to(y.dtype.element_ty))
    else:
        tl.store(at, total.to(y.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["sample_tokens"])
def combine_residual(
    rows,
    slots,
    shared,
    residual,
    scale,
    y,
    sample_tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y [T, D] = residual + scale[sample] * (shared + the token's sum): the end of a block's FFN.

    shared, residual [T, D]; scale [samples, D] is AdaLN's gate, sample = token // sample_tokens.
    Two elementwise passes less, and one rounding instead of three. y may be residual's memory:
    a program reads its numbers before it writes them. Grid: as `combine`.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = columns < D
    if D % BLOCK_D == 0:
        mask = tl.full([BLOCK_D], True, tl.int1)
    total = token_sum(rows, slots, token, columns, D, K, BLOCK_D)
    at = token * D + columns
    factor = tl.load(scale + (token // sample_tokens) * D + columns, mask=mask, other=0.0)
    total += tl.load(shared + at, mask=mask, other=0.0).to(tl.float32)
    total *= factor.to(tl.float32)
    total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)
