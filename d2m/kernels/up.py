"""Kernel `up`: gathered tokens times their expert's W1, bias, activation, gate.

Shape letters: T tokens, D width, E experts, H expert hidden. See placement.py for slots and tiles.
"""

import triton
import triton.language as tl


@triton.jit
def gelu_parts(u):
    """u -> (sigmoid(2z), z') with z = sqrt(2/pi) (u + .044715 u^3): gelu(u) = u sigmoid(2z).

    .5 (1 + tanh z) = sigmoid(2z): one exp instead of a tanh, and -0 (not NaN) far below zero.
    """
    square = u * u
    double_z = 1.5957691216057308 * u * (1.0 + 0.044715 * square)
    slope = 0.7978845608028654 * (1.0 + 0.134145 * square)
    return 1.0 / (1.0 + tl.exp(-double_z)), slope


@triton.jit
def share_of(u, ACTIVATION: tl.constexpr):
    """What u is multiplied with: act(u) = u * share. Of a gated activation u are the gates."""
    if ACTIVATION == "gelu_tanh":
        share, _ = gelu_parts(u)
    elif ACTIVATION == "silu" or ACTIVATION == "swiglu":
        share = 1.0 / (1.0 + tl.exp(-u))
    else:
        share = 0.5 * (1.0 + tl.erf(0.7071067811865476 * u))
    return share


@triton.jit
def derivative_of(u, share, ACTIVATION: tl.constexpr):
    """d act(u) / du, of the gates where it is gated."""
    # Where s is 0 or 1 in float32 the last term is 0 whatever the slope, which may have overflowed.
    bend = share * (1.0 - share)
    if ACTIVATION == "gelu_tanh":
        # s = sigmoid(2z): d/du u s = s + 2 u z' s (1 - s).
        _, slope = gelu_parts(u)
        derivative = share + tl.where(bend == 0.0, 0.0, 2.0 * u * slope * bend)
    elif ACTIVATION == "silu" or ACTIVATION == "swiglu":
        derivative = share + tl.where(bend == 0.0, 0.0, u * bend)
    else:
        derivative = share + u * (0.3989422804014327 * tl.exp(-0.5 * u * u))
    return derivative


@triton.jit
def gathered_pair(
    a,
    w,
    token,
    columns,
    stride_k: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a[token, :] times w[:, columns] and times w[:, N + columns]: gates and values, in one loop.

    w [D, 2 N] of one expert, rows `stride_k` apart. The gathered rows are loaded once for both.
    """
    k = tl.arange(0, BLOCK_K)
    at = a + token[:, None] * D + k[None, :]
    gate_at = w + k[:, None] * stride_k + columns[None, :]
    gates = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    values = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0 and N % BLOCK_N == 0:
            left = tl.load(at)
            right = tl.load(gate_at)
            other = tl.load(gate_at + N)
        else:
            inside = first + k < D
            mask = inside[:, None] & (columns[None, :] < N)
            left = tl.load(at, mask=inside[None, :], other=0.0)
            right = tl.load(gate_at, mask=mask, other=0.0)
            other = tl.load(gate_at + N, mask=mask, other=0.0)
        gates = tl.dot(left, right, gates, input_precision=PRECISION)
        values = tl.dot(left, other, values, input_precision=PRECISION)
        at += BLOCK_K
        gate_at += BLOCK_K * stride_k
    return gates, values


@triton.jit
def gathered_matmul(
    a,
    w,
    token,
    columns,
    stride_k: tl.constexpr,
    stride_n: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a[token, :] [BLOCK_M, D] times one expert's w (D x N by its strides) -> f32 accumulators.

    D and N are constants: masks vanish from the loop wherever the tiles divide them.
    """
    k = tl.arange(0, BLOCK_K)
    at = a + token[:, None] * D + k[None, :]
    weight_at = w + k[:, None] * stride_k + columns[None, :] * stride_n
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            left = tl.load(at)
            if N % BLOCK_N == 0:
                right = tl.load(weight_at)
            else:
                right = tl.load(weight_at, mask=columns[None, :] < N, other=0.0)
        else:
            inside = first + k < D
            left = tl.load(at, mask=inside[None, :], other=0.0)
            right = tl.load(weight_at, mask=inside[:, None] & (columns[None, :] < N), other=0.0)
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
        at += BLOCK_K
        weight_at += BLOCK_K * stride_k
    return accumulator


@triton.jit
def up(
    x,
    w1,
    b1,
    slot_token,
    slot_gate,
    tile_expert,
    tile_rows,
    hidden,
    D: tl.constexpr,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden [slots, H] = gate * act(x[token] W1[expert] + b1[expert]); padding rows become 0.

    A gated W1 [E, D, 2 H] has the gates' columns first. Without BIAS b1 is not touched.

    Grid: tiles * ceil(H / BLOCK_N), the column tiles of a row tile side by side: they share the
    gathered rows, and an expert's 4.7 MB of W1 stay in L2 for all its row tiles. The gate weighs
    the hidden row, H numbers instead of D, in float32 before the one rounding.
    """
    n_tiles: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // n_tiles
    rows = tl.load(tile_rows + tile)
    if rows == 0:
        return
    expert = tl.load(tile_expert + tile).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    slot = tile.to(tl.int64) * BLOCK_M + row
    live = row < rows
    # Padding rows read token 0: its numbers are thrown away, and the loop needs no row mask.
    token = tl.load(slot_token + slot, mask=live, other=0).to(tl.int64)
    columns = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < H
    if GATED:
        w = w1 + expert * D * 2 * H
        u, v = gathered_pair(
            x, w, token, columns, 2 * H, D, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        if BIAS:
            at_bias = b1 + expert * 2 * H + columns
            u += tl.load(at_bias, mask=inside, other=0.0).to(tl.float32)[None, :]
            v += tl.load(at_bias + H, mask=inside, other=0.0).to(tl.float32)[None, :]
        result = u * share_of(u, ACTIVATION) * v
    else:
        u = gathered_matmul(
            x, w1 + expert * D * H, token, columns, H, 1, D, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        if BIAS:
            u += tl.load(b1 + expert * H + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        result = u * share_of(u, ACTIVATION)
    gate = tl.load(slot_gate + slot, mask=live, other=0.0)
    value = tl.where(live[:, None], gate[:, None] * result, 0.0)
    at = hidden + slot[:, None] * H + columns[None, :]
    if H % BLOCK_N == 0:
        tl.store(at, value.to(hidden.dtype.element_ty))
    else:
        tl.store(at, value.to(hidden.dtype.element_ty), mask=inside[None, :])
