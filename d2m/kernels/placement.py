"""Kernel `place`: where every (token, expert) pair goes, and which expert every tile belongs to.

Shape letters: T tokens, E experts, K chosen. Slots: the pairs sorted by expert, stably, every
expert's rows padded to whole tiles of BLOCK_M. A tile therefore has one expert.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "blocks", "tiles"])
def place(
    chosen,
    gates,
    counts,
    slots,
    slot_token,
    slot_gate,
    tile_expert,
    tile_rows,
    expert_slot,
    expert_rows,
    T,
    blocks,
    tiles,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """chosen, gates [T, K], counts [blocks, E_PAD] -> the maps between pairs, slots and tiles.

    slots [T, K] i32; slot_token, slot_gate [tiles * BLOCK_M] i32, f32 (padding is not written);
    tile_expert, tile_rows [tiles] i32 (0 rows: the tile is unused); expert_slot, expert_rows
    [E_PAD] i32. Grid: `blocks` programs, those of `route`. Every program sums the histograms of all
    blocks itself (18 kB from L2 at 36,864 tokens), which saves a launch for the prefix sum.
    """
    block = tl.program_id(0)
    experts = tl.arange(0, E_PAD)
    rows = tl.zeros([E_PAD], dtype=tl.int32)
    before = tl.zeros([E_PAD], dtype=tl.int32)
    for first in range(0, blocks, CHUNK):
        other = first + tl.arange(0, CHUNK)[:, None]
        part = tl.load(counts + other * E_PAD + experts[None, :], mask=other < blocks, other=0)
        rows += tl.sum(part, axis=0)
        before += tl.sum(tl.where(other < block, part, 0), axis=0)
    tiles_of = (rows + BLOCK_M - 1) // BLOCK_M
    tile_end = tl.cumsum(tiles_of, axis=0)
    tile_first = tile_end - tiles_of
    if block == 0:
        tl.store(expert_slot + experts, tile_first * BLOCK_M)
        tl.store(expert_rows + experts, rows)

    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    live = tokens < T
    chose = tl.zeros([BLOCK_T, E_PAD], dtype=tl.int1)
    for k in tl.static_range(K):
        expert = tl.load(chosen + tokens.to(tl.int64) * K + k, mask=live, other=E_PAD)
        # Not a sum: LLVM counts four of these bits in a byte vector that lies in local memory.
        chose |= expert[:, None] == experts[None, :]
    # A token chooses an expert once, so its rank there is the number of earlier tokens that did.
    taken = chose.to(tl.int32)
    position = tl.cumsum(taken, axis=0) - taken + (tile_first * BLOCK_M + before)[None, :]
    for k in tl.static_range(K):
        pairs = tokens.to(tl.int64) * K + k
        expert = tl.load(chosen + pairs, mask=live, other=E_PAD)
        gate = tl.load(gates + pairs, mask=live, other=0.0)
        slot = tl.sum(tl.where(expert[:, None] == experts[None, :], position, 0), axis=1)
        tl.store(slots + pairs, slot, mask=live)
        tl.store(slot_token + slot, tokens, mask=live)
        tl.store(slot_gate + slot, gate, mask=live)

    for first in range(block * CHUNK, tiles, blocks * CHUNK):
        tile = first + tl.arange(0, CHUNK)
        # Experts whose tiles end before this one; E_PAD where the tile is beyond the last.
        owner = tl.sum((tile[:, None] >= tile_end[None, :]).to(tl.int32), axis=1)
        mine = owner[:, None] == experts[None, :]
        left = rows[None, :] - (tile[:, None] - tile_first[None, :]) * BLOCK_M
        count = tl.minimum(tl.sum(tl.where(mine, left, 0), axis=1), BLOCK_M)
        tl.store(tile_expert + tile, owner, mask=tile < tiles)
        tl.store(tile_rows + tile, count, mask=tile < tiles)
