"""Kernel `route`: softmax over the experts, the K largest gates, and a histogram per token block.

Shape letters: T tokens, E experts, K chosen. The meaning is `d2m.model.routing.route`, in float32.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_rows(logits, tokens, live, E: tl.constexpr, E_PAD: tl.constexpr):
    """Probabilities [BLOCK_T, E_PAD] in float32 of the rows `tokens`; 0 beyond E.

    Rows that are not `live` count as zero logits, so that they hold numbers.
    """
    experts = tl.arange(0, E_PAD)[None, :]
    at = logits + tokens[:, None].to(tl.int64) * E + experts
    values = tl.load(at, mask=live[:, None] & (experts < E), other=0.0).to(tl.float32)
    values = tl.where(experts < E, values, float("-inf"))
    weights = tl.exp(values - tl.max(values, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit(do_not_specialize=["T"])
def route(
    logits,
    gates,
    chosen,
    counts,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """logits [T, E] f32 -> gates [T, K] f32, chosen [T, K] i32, counts [blocks, E_PAD] i32.

    Grid: one program for every BLOCK_T tokens. Equal gates go to the lowest expert. Compared are
    the bits of the probabilities: for numbers >= 0 they order as the numbers do, and NaN is the
    largest, as in torch.sort, so that any logits give K distinct experts within 0..E-1.
    """
    block = tl.program_id(0)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, E_PAD)[None, :]
    live = tokens < T
    probabilities = softmax_rows(logits, tokens, live, E, E_PAD)
    bits = probabilities.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(experts < E, bits, -1)
    for k in tl.static_range(K):
        best = tl.max(bits, axis=1)[:, None]
        expert = tl.min(tl.where(bits == best, experts, E_PAD), axis=1)
        here = experts == expert[:, None]
        gate = tl.sum(tl.where(here, probabilities, 0.0), axis=1)
        bits = tl.where(here, -1, bits)
        pairs = tokens.to(tl.int64) * K + k
        tl.store(gates + pairs, gate, mask=live)
        tl.store(chosen + pairs, expert, mask=live)
    # A chosen expert's bits have become -1, and so have those of the padding.
    taken = (bits < 0) & (experts < E) & live[:, None]
    histogram = tl.sum(taken.to(tl.int32), axis=0)
    tl.store(counts + block * E_PAD + tl.arange(0, E_PAD), histogram)
