"""What a call launches, checked without triton: bounds, grids, tiles."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest

from d2m.kernels.configs import SHARED_LIMIT, shared_limit, stream_of, tiles_for
from d2m.kernels.plan import KERNELS, Sizes, backward_plan, ceil_div, forward_plan, tiles_bound

FLUX = Sizes(4096, 3072, 12, 768, 2, "bf16")
ARCHITECTURES = sorted(SHARED_LIMIT)


def test_the_bound_on_tiles_holds_and_is_reached():
    generator = random.Random(0)
    for _ in range(2000):
        tokens, experts = generator.randint(1, 300), generator.randint(1, 16)
        top_k, rows = generator.randint(1, experts), generator.choice([16, 32, 128])
        counts, left = [], tokens * top_k
        for expert in range(experts):
            # As uneven as a routing can be: an expert has at most one row of every token.
            rest = (experts - expert - 1) * tokens
            counts.append(generator.randint(max(0, left - rest), min(left, tokens)))
            left -= counts[-1]
        assert left == 0
        sizes = Sizes(tokens, 32, experts, 32, top_k, "fp32")
        assert sum(ceil_div(count, rows) for count in counts) <= tiles_bound(sizes, rows)
    # 12 experts with one row each, and 12 with 16 k + 1 rows: nothing smaller would do.
    assert tiles_bound(Sizes(12, 32, 12, 32, 1, "fp32"), 16) == 12
    assert tiles_bound(Sizes(12 * 17, 32, 12, 32, 1, "fp32"), 16) == 24


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("tokens", [1, 512, 4096])
def test_tiles_fit_together(sm, dtype, tokens):
    for width, hidden in ((3072, 768), (128, 32), (24, 6)):
        tiles = tiles_for(sm, dtype, tokens, width, hidden)
        row_tiles = (tiles.up, tiles.down, tiles.hidden_backward, tiles.dx)
        assert {tile.m for tile in row_tiles} == {tiles.m}
        for tile in (*row_tiles, tiles.weights):
            assert all(n >= 16 and n & (n - 1) == 0 for n in (tile.m, tile.n, tile.k))
            assert tile.warps in (4, 8)
        assert tiles.block_t & (tiles.block_t - 1) == 0


def test_the_two_streams():
    assert [stream_of(tokens) for tokens in (1, 512, 2047, 2048, 36_864)] == [
        *["text"] * 3,
        *["image"] * 2,
    ]
    text, image = (tiles_for(90, "bf16", tokens, 3072, 768) for tokens in (512, 4096))
    assert text.m == 64 and image.m == 128


def test_an_old_gpu_is_refused():
    assert shared_limit(121) == SHARED_LIMIT[120]
    with pytest.raises(ValueError, match="sm_75.*sm_80"):
        shared_limit(75)


def test_every_argument_is_a_tensor_of_the_plan_or_a_number():
    tiles = tiles_for(90, "bf16", 4096, 3072, 768)
    for need_x, need_weights in ((True, True), (True, False), (False, True), (False, False)):
        plan = backward_plan(FLUX, tiles, need_x, need_weights)
        for launch in (*plan.launches, *forward_plan(FLUX, tiles).launches):
            assert launch.kernel in KERNELS
            assert all(size >= 1 for size in launch.grid)
        for launch in plan.launches:
            for _, value in launch.arguments:
                assert isinstance(value, int) or plan.dtype(value)
        wanted = {"dlogits"} | ({"dx"} if need_x else set())
        wanted |= {"dw1", "db1", "dw2"} if need_weights else set()
        assert set(plan.outputs) == wanted


def test_constants_do_not_depend_on_the_number_of_tokens():
    """One set of cubins serves every T of a stream."""
    tiles = tiles_for(90, "bf16", 4096, 3072, 768)
    for make in (forward_plan, lambda s, t: backward_plan(s, t, True, True)):
        plans = [make(replace(FLUX, tokens=tokens), tiles) for tokens in (2048, 4097, 36_864)]
        kinds = [[(x.label, x.constants, x.warps, x.stages) for x in p.launches] for p in plans]
        assert kinds[0] == kinds[1] == kinds[2]


def test_grids_stay_below_what_cuda_takes():
    sizes = replace(FLUX, tokens=36_864 * 4, top_k=4)
    tiles = tiles_for(90, "bf16", sizes.tokens, 3072, 768)
    for launch in backward_plan(sizes, tiles, True, True).launches:
        assert launch.grid[0] < 2**31 and all(size < 65_536 for size in launch.grid[1:])


def test_importing_the_launcher_loads_no_triton():
    code = "import sys, d2m.kernels.op, d2m.model.experts_op; print('triton' in sys.modules)"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
