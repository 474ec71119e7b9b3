"""What becomes of a quantised product's left side, in torch: parity's arithmetic.

`rounded(kind, x)` returns the numbers that are multiplied, in float32. Scales follow from a token's
own numbers (dynamic, a scale a token), so that an image is the same whatever else is in its batch:

int8    -127 to 127 by the token's largest
int4    as they are
fp8     float8_e4m3fn, the token's largest becoming the format's
nvfp4   float4_e2m1, 16 numbers by their largest; a sixth of it, rounded to FP8, is their scale
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.quant.formats import FP4_MAX, FP8_MAX, TOKEN_MAX, Format
from export.quant.weights import TINY, fp4_bits, fp4_values

if TYPE_CHECKING:
    from torch import Tensor


def rounded(kind: Format, x: Tensor) -> Tensor:
    """x [.., K] as the left side of a product by weights of this format is, float32."""
    return ROUNDED[kind.name](x.float())


def by_int8(x: Tensor) -> Tensor:
    """See above."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(TINY) / TOKEN_MAX
    return (x / scale).round() * scale


def by_fp8(x: Tensor) -> Tensor:
    """See above."""
    import torch

    scale = x.abs().amax(-1, keepdim=True).clamp_min(TINY) / FP8_MAX
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def by_nvfp4(x: Tensor) -> Tensor:
    """See above."""
    import torch

    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    wanted = (blocks.abs().amax(-1, keepdim=True) / FP4_MAX).clamp_max(FP8_MAX)
    scale = wanted.to(torch.float8_e4m3fn).float()
    numbers = fp4_values(fp4_bits(blocks / torch.where(scale == 0, torch.inf, scale)))
    return (numbers * scale).reshape(x.shape)


ROUNDED = {"int8": by_int8, "int4": lambda x: x, "fp8": by_fp8, "nvfp4": by_nvfp4}
