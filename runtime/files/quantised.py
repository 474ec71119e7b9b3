"""Quantised weights as the numbers that they stand for, in numpy.

For plans that compute in 16 bits, on GPUs whose tensor cores do not multiply a bundle's format:
weights are dequantised while they are brought there. Layouts: export/quant/weights.py.
"""

from __future__ import annotations

from functools import cache

import numpy as np

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantised(weight: np.ndarray, dtype: str, scales: list[np.ndarray]) -> np.ndarray:
    """[.., K, N] in float32 of a weight stored as `dtype` (as files name it) and its `scales`.

    I8 and F8_E4M3 have a scale a column; U8 is two numbers a byte: whole ones with a scale a block,
    or FP4 with a scale a block in FP8 (its bits) and one a row.
    """
    if dtype in ("I8", "F8_E4M3"):
        values = weight.astype(np.float32) if dtype == "I8" else float8(weight)
        values *= scales[0][..., None, :]
        return values
    halves = np.stack([weight & 15, weight >> 4], -1)
    if len(scales) == 1:
        values, block = halves.astype(np.float32) - 8, scales[0]
    else:
        values = np.array([*FP4_VALUES, *(-v for v in FP4_VALUES)], np.float32)[halves]
        block = float8(scales[0]) * scales[1][..., None]
    blocks = values.reshape(*block.shape, -1)
    blocks *= block[..., None]
    rows = blocks.reshape(*block.shape[:-1], -1)
    return np.ascontiguousarray(np.swapaxes(rows, -1, -2))


def float8(bits: np.ndarray) -> np.ndarray:
    """float8_e4m3fn's bits (uint8) -> float32."""
    return table()[bits]


@cache
def table() -> np.ndarray:
    """The value of every float8_e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[(bits & 127) == 127] = np.nan
    return np.where(bits > 127, -values, values).astype(np.float32)
