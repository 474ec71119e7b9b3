"""Weights to quantised tensors and back, one at a time.

`pack` takes [.., K, N] as products read it; what comes out is laid out as the kernels want it:

int8    [.., K, N] int8; scale [.., N] float32
int4    [.., N, G, block / 2] uint8, the first of two numbers in the low half, 8 standing for zero;
        scale [.., N, G] bfloat16 (MatMulNBits's layout)
fp8     [.., K, N] float8_e4m3fn; scale [.., N] float32
nvfp4   [.., N, K / 2] uint8, two float4_e2m1, the first in the low half; scale [.., N, K / 16]
        float8_e4m3fn; scale_2 [.., N] float32 (ModelOpt's layout, its scale_2 one number a tensor)

Shape letters: K numbers in, N numbers out, G blocks of a row (K / block).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from export.quant.formats import FP4_MAX, FP8_MAX, INT8_MAX, Format

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The values of float4_e2m1 by their three low bits; the fourth is the sign.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway between neighbours
PIECE = 4096  # blocks at a time: what is computed on the way stays in a core's cache
TINY = 2.0**-100  # a scale for blocks of nothing but zeros


def shapes(kind: Format, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of the tensors that a weight [.., K, N] becomes."""
    *lead, rows, columns = shape
    groups = rows // kind.block if kind.block else 1
    if kind.name == "int4":
        sides = {"": (columns, groups, kind.block // 2), "_scale": (columns, groups)}
    elif kind.name == "nvfp4":
        sides = {"": (columns, rows // 2), "_scale": (columns, groups), "_scale_2": (columns,)}
    else:
        sides = {"": (rows, columns), "_scale": (columns,)}
    return {part: (*lead, *each) for part, each in sides.items()}


def pack(kind: Format, weight: Tensor) -> dict[str, Tensor]:
    """A weight [.., K, N] -> its tensors by suffix; `shapes` says their shapes."""
    return PACK[kind.name](kind, weight.float())


def unpack(kind: Format, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight [.., K, N] in float32 that `parts` stand for."""
    return UNPACK[kind.name](kind, parts)


# ---------------------------------------------------------------- a scale a column


def pack_int8(kind: Format, weight: Tensor) -> dict[str, Tensor]:
    """Symmetric, by the column's largest number."""
    import torch

    scale = weight.abs().amax(-2, keepdim=True).clamp_min(TINY) / INT8_MAX
    whole = (weight / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return {"": whole, "_scale": scale.squeeze(-2)}


def pack_fp8(kind: Format, weight: Tensor) -> dict[str, Tensor]:
    """By the column's largest number, which becomes the format's largest."""
    import torch

    scale = weight.abs().amax(-2, keepdim=True).clamp_min(TINY) / FP8_MAX
    return {"": (weight / scale).to(torch.float8_e4m3fn), "_scale": scale.squeeze(-2)}


def scaled(kind: Format, parts: Mapping[str, Tensor]) -> Tensor:
    """int8 and fp8 back."""
    return parts[""].float() * parts["_scale"].float().unsqueeze(-2)


# ---------------------------------------------------------------- a scale a block


def blocks_of(kind: Format, weight: Tensor) -> Tensor:
    """[.., K, N] -> [.., N, G, block]."""
    by_row = weight.transpose(-1, -2)
    return by_row.reshape(*by_row.shape[:-1], -1, kind.block)


def halves(numbers: Tensor) -> Tensor:
    """[.., n] of 0 to 15 -> [.., n / 2] uint8, the first of two in the low half."""
    return numbers[..., 0::2] | numbers[..., 1::2] << 4


def numbers_of(packed: Tensor) -> Tensor:
    """`halves` back."""
    import torch

    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def pack_int4(kind: Format, weight: Tensor) -> dict[str, Tensor]:
    """-8 to 7 times a scale, by which the block's squared error is least of a few tried.

    The number of the largest size becomes -8, whichever its sign (as llama.cpp's Q4_0 does), or a
    little less; then the scale is fitted to the numbers chosen.
    """
    import torch

    blocks = blocks_of(kind, weight)
    rows = blocks.reshape(-1, kind.block)
    packed = torch.empty(len(rows), kind.block // 2, dtype=torch.uint8)
    scales = torch.empty(len(rows), dtype=torch.bfloat16)
    for start in range(0, len(rows), PIECE):
        piece = slice(start, start + PIECE)
        packed[piece], scales[piece] = int4_blocks(rows[piece])
    shape = blocks.shape[:-1]
    return {"": packed.reshape(*shape, -1), "_scale": scales.reshape(shape)}


def int4_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [n, block] -> numbers [n, block / 2] and scales [n]; see pack_int4."""
    import torch

    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    best = torch.full_like(largest, float("inf"))
    whole, scale = torch.zeros_like(blocks), torch.zeros_like(largest)
    for extreme in (-8.0, -7.0, -9.0):
        tried = stored(largest / extreme, torch.bfloat16)
        numbers = (blocks / tried).round_().clamp_(-8, 7)
        size = numbers.square().sum(-1, keepdim=True).clamp_min_(1)
        fitted = stored((blocks * numbers).sum(-1, keepdim=True) / size, torch.bfloat16)
        numbers = (blocks / fitted).round_().clamp_(-8, 7)
        error = (numbers * fitted).sub_(blocks).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, fitted, scale)
        whole = torch.where(better, numbers, whole)
    return halves(whole.add_(8).to(torch.uint8)), scale.squeeze(-1).bfloat16()


def unpack_int4(kind: Format, parts: Mapping[str, Tensor]) -> Tensor:
    """int4 back."""
    blocks = (numbers_of(parts[""]).float() - 8) * parts["_scale"].float().unsqueeze(-1)
    return blocks.flatten(-2).transpose(-1, -2).contiguous()


def pack_nvfp4(kind: Format, weight: Tensor) -> dict[str, Tensor]:
    """float4_e2m1 by the block's largest number; blocks' scales in FP8 by the column's largest."""
    import torch

    blocks = blocks_of(kind, weight)
    wanted = blocks.abs().amax(-1) / FP4_MAX  # [.., N, G]
    outer = wanted.amax(-1).clamp_min(TINY) / FP8_MAX
    inner = (wanted / outer.unsqueeze(-1)).to(torch.float8_e4m3fn)
    scale = (inner.float() * outer.unsqueeze(-1)).reshape(-1, 1)
    rows = blocks.reshape(-1, kind.block)
    packed = torch.empty(len(rows), kind.block // 2, dtype=torch.uint8)
    for start in range(0, len(rows), PIECE):
        piece = slice(start, start + PIECE)
        by = scale[piece]
        packed[piece] = halves(fp4_bits(rows[piece] / torch.where(by == 0, torch.inf, by)))
    return {"": packed.reshape(*blocks.shape[:-2], -1), "_scale": inner, "_scale_2": outer}


def fp4_bits(values: Tensor) -> Tensor:
    """To the nearest float4_e2m1, ties to the even one, as its four bits (uint8)."""
    import torch

    size, edges = values.abs().contiguous(), torch.tensor(FP4_EDGES, device=values.device)
    below = torch.bucketize(size, edges)  # a tie goes to the lower neighbour,
    above = torch.bucketize(size, edges, right=True)  # or to the upper one
    bits = torch.where(below % 2 == 0, below, above)
    return (bits + 8 * torch.signbit(values)).to(torch.uint8)


def fp4_values(bits: Tensor) -> Tensor:
    """Four bits (uint8) -> float32."""
    import torch

    table = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], device=bits.device)
    return table[bits.long()]


def unpack_nvfp4(kind: Format, parts: Mapping[str, Tensor]) -> Tensor:
    """nvfp4 back."""
    blocks = fp4_values(numbers_of(parts[""]))
    blocks = blocks.reshape(*blocks.shape[:-1], -1, kind.block)
    blocks = blocks * parts["_scale"].float().unsqueeze(-1)
    weight = blocks.flatten(-2) * parts["_scale_2"].float().unsqueeze(-1)
    return weight.transpose(-1, -2).contiguous()


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, and never zero."""
    import torch

    rounded = values.to(dtype).float()
    return torch.where(rounded == 0, TINY, rounded)


PACK: dict[str, Callable[[Format, Tensor], dict[str, Tensor]]] = {
    "int8": pack_int8,
    "int4": pack_int4,
    "fp8": pack_fp8,
    "nvfp4": pack_nvfp4,
}
UNPACK: dict[str, Callable[[Format, Mapping[str, Tensor]], Tensor]] = {
    "int8": scaled,
    "int4": unpack_int4,
    "fp8": scaled,
    "nvfp4": unpack_nvfp4,
}
