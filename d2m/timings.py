"""How long a phase took before on this machine: seconds by item, kept between runs.

Only of phases whose items are alike from model to model (plans, traces, kernels), in one small JSON
file in the user's cache directory. It may be deleted at any time; nothing is computed from it but
what the person at the terminal is told.
"""

from __future__ import annotations

import os
from pathlib import Path

from runtime.files.atomic import write_json
from runtime.files.checked_json import read_json

ALIKE = ("plans", "trace", "kernels")  # first words of phases
LIMIT = 100  # phases kept
SHORT = 1.0  # seconds; what is over sooner is not worth a word


def file() -> Path:
    """Where timings are kept: $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "d2m" / "timings.json"


def expected(phase: str, items: int) -> float | None:
    """Seconds that `items` of a phase took before; None where nothing is known."""
    each = known().get(phase)
    return each * items if each is not None else None


def remember(phase: str, seconds: float, items: int) -> None:
    """Keep what a phase took, if its items are alike; an unwritable cache is no fault."""
    if items < 1 or seconds < SHORT or phase.split()[0] not in ALIKE:
        return
    kept = known()
    kept.pop(phase, None)
    rows = [*list(kept.items())[-LIMIT + 1 :], (phase, round(seconds / items, 3))]
    try:
        write_json(file(), dict(rows))
    except OSError:
        return


def known() -> dict[str, float]:
    """Phase -> seconds by item; {} where there is no file, or something else in it."""
    try:
        told = read_json(file())
    except (OSError, ValueError):
        return {}
    return {k: float(v) for k, v in told.items() if isinstance(v, (int, float)) and 0 <= v < 1e6}
