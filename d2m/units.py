"""Quantities as people read them."""

from __future__ import annotations

import math

GB = 10**9  # bytes


def count_text(number: int) -> str:
    """A parameter count as people say it: `5.15 B`, `11.4 M`, `812 k`, `96`."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def bytes_text(size: float) -> str:
    """12.3 GB, 840 MB."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.0f} MB"


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percent(share: float, digits: int = 0) -> str:
    """.287 as `29 %`."""
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """2.4 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def power(value: float) -> str:
    """1.6e-07 as 1.6 times 10 to the -7, in superscript digits."""
    if value <= 0:
        return "0"
    exponent = math.floor(math.log10(value))
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value / 10.0**exponent:.1f}·10{digits}"
