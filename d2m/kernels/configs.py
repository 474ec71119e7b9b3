"""Tile sizes by compute capability, dtype and size of the stream: chosen by rule, not by search.

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen. Nothing is imported: the
rules serve the launcher, the ahead-of-time compiler and tests alike. Read off compiled
code (see tests/d2m/kernels): 128 x 128 x 64 with 8 warps and one accumulator spills nowhere;
128 x 256 fits sm_90 only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Bytes of shared memory one program may have (read: CUDA programming guide). Triton does not check.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# From here on a stream is an image's; FLUX's text stream has 512 tokens a sample.
IMAGE_TOKENS = 2048
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def next_power(number: int) -> int:
    """The smallest power of two that is at least `number` (and at least 1)."""
    return 1 << max(number - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """One matmul program: an m x n tile of the result, k deep per step; warps, pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def fitted(self, columns: int, depth: int) -> Tile:
        """No wider or deeper than the problem (16 is the least tl.dot takes), warps to match."""
        n = min(self.n, max(16, next_power(columns)))
        k = min(self.k, max(16, next_power(depth)))
        return replace(self, n=n, k=k, warps=self.warps if self.m * n >= 8192 else 4)


@dataclass(frozen=True)
class Tiles:
    """The tiles of one call. `up`, `down` and their backward share m: a slot tile's rows."""

    name: str
    block_t: int
    up: Tile
    down: Tile
    hidden_backward: Tile
    dx: Tile
    weights: Tile

    @property
    def m(self) -> int:
        return self.up.m


def stream_of(tokens: int) -> str:
    """Which of the two configurations a call of T tokens takes: "image" or "text"."""
    return "image" if tokens >= IMAGE_TOKENS else "text"


def shared_limit(sm: int) -> int:
    """Shared memory per program of sm, or of the nearest older architecture that is known."""
    known = [arch for arch in SHARED_LIMIT if arch <= sm]
    if not known:
        raise ValueError(f"sm_{sm} is too old for these kernels; expected sm_80 or newer.")
    return SHARED_LIMIT[max(known)]


def tiles_for(
    sm: int, dtype: str, tokens: int, width: int, hidden: int, gated: bool = False
) -> Tiles:
    """The tiles for one architecture (80, 90, ...), dtype ("bf16", "fp16", "fp32") and stream.

    fp32 multiplies in full float32 (no tf32): FFMA units, small tiles, registers are the limit.
    Text: about 85 rows per expert at T = 512, K = 2, so 64-row tiles waste less. Gated experts have
    two accumulators in `up` and three in its backward, so their tiles are half as wide.
    """
    stream, hopper = stream_of(tokens), sm // 10 == 9
    roomy = shared_limit(sm) > 150_000
    # 5 stages: loads through `slot_token` count double, so that 5 give three buffers.
    weights = Tile(128, 128, 64, 8, 5)
    if dtype == "fp32":
        plain = Tile(64 if stream == "image" else 32, 64, 32, 4, 2)
        tiles = (plain, plain, plain, plain)
        weights = Tile(64, 64, 32, 4, 2)
    elif stream == "image":
        # 96 kB and 104 registers: two programs of `up` share an SM of sm_90.
        square = Tile(128, 128, 64, 8, 3)
        wide = Tile(128, 256, 64, 8, 3) if hopper else square
        # Two accumulators: 128 columns take 254 registers with HGMMA and spill with HMMA, and with
        # HGMMA too where H ends inside a tile and masks want registers (H = 288: 86 spills). On
        # sm_100 float16 has two registers too few as well (8 bytes spilled).
        roomy_two = (hopper or (sm // 10 == 10 and dtype == "bf16")) and hidden % 128 == 0
        two = Tile(128, 128 if roomy_two else 64, 64, 8, 3)
        tiles = (square, wide, two, wide)
    else:
        small = Tile(64, 128, 64, 4, 4 if roomy else 3)
        tiles = (Tile(64, 64, 128, 4, 3), small, Tile(64, 64, 64, 4, 4), small)
    up, down, hidden_backward, dx = tiles
    if gated:
        up = replace(up, n=up.n // 2, k=min(up.k, 64))
        hidden_backward = replace(hidden_backward, n=min(hidden_backward.n // 2, 64))
    return Tiles(
        stream,
        128 if stream == "image" else 32,
        up.fitted(hidden, width),
        down.fitted(width, hidden),
        hidden_backward.fitted(hidden, width),
        dx.fitted(width, hidden),
        weights.fitted(max(width, hidden), weights.k),
    )
