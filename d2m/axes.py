"""Where an axis puts its ticks, and what it writes beside them."""

from __future__ import annotations

import math


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers 1, 2 or 5 times a power of ten apart that cover low..high."""
    if not high > low:
        return [low, low + 1.0]
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in low..high, with 2 and 5 of each where there are few of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1,) if last - first > 4 else (1, 3) if last - first > 2 else (1, 2, 5)
    found = [m * 10.0**power for power in range(first, last + 1) for m in steps]
    return [tick for tick in found if low * 0.999 <= tick <= high * 1.001]


def number(value: float) -> str:
    """A tick's label: 0.002, 40, 1.5 k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g} k"
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:g}"


def percent_tick(value: float) -> str:
    """A share's label: .25 as `25 %`."""
    return f"{100 * value:.4g} %"


def log_range(low: float, high: float) -> tuple[float, float]:
    """At least a factor of 1.5, bounds a little outside the data."""
    low, high = max(low, 1e-30), max(high, 1e-30)
    margin = max((high / low) ** 0.05, 1.25 if high < 1.5 * low else 1.0)
    return low / margin, high * margin
