"""Kernels `hidden_backward`, `weight_backward`, `gate_backward`; `down` and `combine` serve again.

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen. The forward keeps nothing:
u, the activation and the hidden rows are computed again here.
"""

import triton
import triton.language as tl

from d2m.kernels.routing import softmax_rows
from d2m.kernels.up import derivative_of, gathered_matmul, gathered_pair, share_of


@triton.jit
def hidden_backward(
    dy,
    x,
    w1,
    b1,
    w2,
    slot_token,
    slot_gate,
    tile_expert,
    tile_rows,
    hidden,
    dbefore,
    dgate_parts,
    slots_in_all,
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
    """Everything between dy and the matmuls that end the backward, for one tile of hidden rows.

    hidden [slots, H] = gate * act(u); dbefore [slots, H] = gate * act'(u) * (dy W2^T), of a gated
    activation [slots, 2 H], the gates' columns first; and dgate_parts [ceil(H / BLOCK_N),
    slots_in_all] f32, the column tile's share of sum_h act(u) * (dy W2^T). Padding rows become 0.
    Grid: tiles * ceil(H / BLOCK_N).
    Two loops over D, one after the other: a pipeline stage then holds two tiles, not four.
    """
    n_tiles: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // n_tiles
    rows = tl.load(tile_rows + tile)
    if rows == 0:
        return
    n = tl.program_id(0) % n_tiles
    expert = tl.load(tile_expert + tile).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    slot = tile.to(tl.int64) * BLOCK_M + row
    live = row < rows
    token = tl.load(slot_token + slot, mask=live, other=0).to(tl.int64)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    dhidden = gathered_matmul(
        dy, w2 + expert * D * H, token, columns, 1, D, D, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )
    inside = columns < H
    valid = live[:, None] & inside[None, :]
    gate = tl.load(slot_gate + slot, mask=live, other=0.0)[:, None]
    kind = hidden.dtype.element_ty
    if GATED:
        w = w1 + expert * D * 2 * H
        u, v = gathered_pair(
            x, w, token, columns, 2 * H, D, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        if BIAS:
            at_bias = b1 + expert * 2 * H + columns
            u += tl.load(at_bias, mask=inside, other=0.0).to(tl.float32)[None, :]
            v += tl.load(at_bias + H, mask=inside, other=0.0).to(tl.float32)[None, :]
        share = share_of(u, ACTIVATION)
        curved = u * share
        result = curved * v
        dvalues = tl.where(valid, gate * curved * dhidden, 0.0).to(kind)
        derivative = derivative_of(u, share, ACTIVATION)
        before = tl.where(valid, gate * derivative * v * dhidden, 0.0).to(kind)
    else:
        u = gathered_matmul(
            x, w1 + expert * D * H, token, columns, H, 1, D, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        if BIAS:
            u += tl.load(b1 + expert * H + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        share = share_of(u, ACTIVATION)
        result = u * share
        derivative = derivative_of(u, share, ACTIVATION)
        before = tl.where(valid, gate * derivative * dhidden, 0.0).to(kind)
        dvalues = before
    part = tl.sum(tl.where(valid, result * dhidden, 0.0), axis=1)
    tl.store(dgate_parts + n.to(tl.int64) * slots_in_all + slot, part)
    at = hidden + slot[:, None] * H + columns[None, :]
    at_before = dbefore + slot[:, None] * (2 * H if GATED else H) + columns[None, :]
    if H % BLOCK_N == 0:
        tl.store(at, tl.where(valid, gate * result, 0.0).to(kind))
        tl.store(at_before, before)
        if GATED:
            tl.store(at_before + H, dvalues)
    else:
        mask = inside[None, :]
        tl.store(at, tl.where(valid, gate * result, 0.0).to(kind), mask=mask)
        tl.store(at_before, before, mask=mask)
        if GATED:
            tl.store(at_before + H, dvalues, mask=mask)


@triton.jit
def weight_backward(
    a,
    b,
    slot_token,
    expert_slot,
    expert_rows,
    dw,
    db,
    M: tl.constexpr,
    N: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw [E, M, N] = sum over an expert's rows of a[row, :]^T b[row, :]; with BIAS db = sum of b.

    dW1: a = x (gathered by token), b = dbefore, db = db1. dW2: a = hidden, b = dy (gathered).
    Grid: (ceil(M / BLOCK_M) * ceil(N / BLOCK_N), E). Experts without rows get zeros; the sum runs
    over rows in their order, so the bits are the same on every run.
    """
    n_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    m = tl.program_id(0) // n_tiles
    n = tl.program_id(0) % n_tiles
    expert = tl.program_id(1)
    start = tl.load(expert_slot + expert)
    count = tl.load(expert_rows + expert)
    rows_m = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    bias = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(0, count, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        live = row < count
        slot = (start + row).to(tl.int64)
        if GATHER_A or GATHER_B:
            token = tl.load(slot_token + slot, mask=live, other=0).to(tl.int64)
        a_row = token if GATHER_A else slot
        b_row = token if GATHER_B else slot
        left_mask = live[None, :]
        if M % BLOCK_M != 0:
            left_mask = left_mask & (rows_m[:, None] < M)
        right_mask = live[:, None]
        if N % BLOCK_N != 0:
            right_mask = right_mask & (columns[None, :] < N)
        left = tl.load(a + a_row[None, :] * M + rows_m[:, None], mask=left_mask, other=0.0)
        right = tl.load(b + b_row[:, None] * N + columns[None, :], mask=right_mask, other=0.0)
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
        if BIAS:
            bias += tl.sum(right.to(tl.float32), axis=0)
    valid = (rows_m[:, None] < M) & (columns[None, :] < N)
    at = dw + expert.to(tl.int64) * M * N + rows_m[:, None] * N + columns[None, :]
    tl.store(at, accumulator.to(dw.dtype.element_ty), mask=valid)
    if BIAS and m == 0:
        tl.store(db + expert * N + columns, bias.to(db.dtype.element_ty), mask=columns < N)


@triton.jit(do_not_specialize=["T"])
def gate_backward(
    logits,
    chosen,
    slots,
    dgate_parts,
    dlogits,
    T,
    slots_in_all,
    E: tl.constexpr,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """dlogits [T, E] f32 through the softmax over all E, of which the chosen K reach the output.

    Grid: one program for every BLOCK_T tokens, as `route`. The gates' gradients are the sums of
    their PARTS, in order.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = tokens < T
    experts = tl.arange(0, E_PAD)[None, :]
    probabilities = softmax_rows(logits, tokens, live, E, E_PAD)
    dprobabilities = tl.zeros([BLOCK_T, E_PAD], dtype=tl.float32)
    for k in tl.static_range(K):
        pairs = tokens.to(tl.int64) * K + k
        expert = tl.load(chosen + pairs, mask=live, other=E_PAD)
        slot = tl.load(slots + pairs, mask=live, other=0).to(tl.int64)
        dgate = tl.zeros([BLOCK_T], dtype=tl.float32)
        for part in range(PARTS):
            offset = part * slots_in_all.to(tl.int64) + slot
            dgate += tl.load(dgate_parts + offset, mask=live, other=0.0)
        dprobabilities += tl.where(expert[:, None] == experts, dgate[:, None], 0.0)
    dot = tl.sum(dprobabilities * probabilities, axis=1)[:, None]
    at = dlogits + tokens[:, None].to(tl.int64) * E + experts
    value = probabilities * (dprobabilities - dot)
    tl.store(at, value, mask=live[:, None] & (experts < E))
