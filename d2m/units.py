"""Quantities as people read them."""

from __future__ import annotations

GB = 10**9  # bytes


def human(number: int) -> str:
    """A parameter count as people say it: `5.15 B`, `11.4 M`, `812 k`, `96`."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def shown(size: float) -> str:
    """12.3 GB, 840 MB."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.0f} MB"


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
