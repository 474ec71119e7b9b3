"""Triton kernels of `d2m::routed_experts`: one source for training, inference and packaging.

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen. Importing this package, and
`configs`, `plan` and `op` of it, imports no triton; the files that hold kernels do.

    y[t] = sum over the K largest gates of  gate * (act(x[t] W1[e] + b1[e]) W2[e])

`gate` is softmax(logits) in float32, not renormalised; ties go to the lowest expert; `act` is one
of d2m.families.site.ACTIVATIONS (a gated one reads both halves of W1 in one loop, and its tiles are
half as wide); b1 may be missing; there is no routed output bias (it lives in the shared expert),
hence no db2. x [T, D], W1 [E, D, H] (gated [E, D, 2 H]), b1 [E, H], W2 [E, H, D] in bf16, fp16 or
fp32 with float32 accumulation; logits [T, E] in fp32. All tensors are contiguous, T >= 1 (a caller
returns at once for T = 0), 1 <= K <= E.

Pairs (token, expert) are sorted by expert into *slots*, every expert's rows padded to whole tiles
of BLOCK_M, so that a row tile has one expert. How many tiles that takes depends on the routing,
its bound does not: tiles = (T K + min(E, T K) (BLOCK_M - 1)) // BLOCK_M, slots = tiles BLOCK_M.
Grids are made for the bound and superfluous programs end at once: no count ever reaches the host,
and a call can be captured in a CUDA graph. Sums run in a fixed order without atomics: the same
inputs give the same bits. No kernel reads scratch that no kernel of the same call has written.

Forward, in this order on one stream; "pad" is E rounded up to a power of two, `blocks` is
ceil(T / BLOCK_T), ceil-divisions written a // b:

| kernel | grid | parameters in order (then Triton's two scratch pointers, to be null) |
|---|---|---|
| route | blocks | logits, gates, chosen, counts, T |
| place | blocks | chosen, gates, counts, slots, slot_token, slot_gate, tile_expert, |
|       |        | tile_rows, expert_slot, expert_rows, T, blocks, tiles |
| up | tiles * (H // BLOCK_N) | x, w1, b1, slot_token, slot_gate, tile_expert, tile_rows, hidden |
| down | tiles * (D // BLOCK_N) | hidden, w2, tile_expert, tile_rows, rows |
| combine | (T, D // BLOCK_D) | rows, slots, y |
| or combine_residual | the same | rows, slots, shared, residual, scale, y, sample_tokens |

Scratch: gates [T, K] fp32; chosen, slots [T, K] i32; counts [blocks, pad] i32; slot_token i32 and
slot_gate fp32 [slots]; tile_expert, tile_rows [tiles] i32; expert_slot, expert_rows [pad] i32;
hidden [slots, H] and rows [slots, D] in x's dtype.

Backward: route and place again, then hidden_backward (u, act and the hidden rows computed again,
their gradients, the gates' gradients in parts), gate_backward (dlogits), down with W1 transposed
and combine (dx), weight_backward twice (dW1 with db1, dW2). Scratch beyond the forward's: dbefore
[slots, H] (gated [slots, 2 H]), dgate_parts [H // BLOCK_N, slots] fp32.

`combine_residual` ends a block at once: y = residual + scale[sample] * (shared + routed).

`plan.forward_plan`, `plan.residual_plan` and `plan.backward_plan` give all of this as data for
given sizes; `configs.tiles_for(sm, dtype, T, D, H)` gives the tiles; `op.forward_triton`,
`op.forward_residual` and `op.backward_triton` run a plan with torch tensors;
`compile.compile_launch(plan, launch, sm)` compiles one kernel of it without a GPU, and
`compile.inspect` reads its machine code. D, H, E, K and the tiles are constants of that code,
T is not: one set of cubins serves all T of a stream. `up`, `down` and `weight_backward` do not
depend on K.

The kernels stand in `routing`, `placement`, `up`, `down` and `backward`; `extents` has the sizes
that follow from T as text, `ptx` the form that a TensorRT plugin launches, `package` all of it as
files.
"""
