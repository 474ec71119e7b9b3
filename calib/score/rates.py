"""Proportions with Wilson intervals."""

from __future__ import annotations

from collections.abc import Sequence


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (low, high) for a proportion; z = 1.959964 gives 95 %.

    Unlike the normal interval it stays inside 0..1 and is right near the ends. Raises ValueError if
    n < 1 or successes is not in 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"wilson: {successes} of {n} is no proportion; expected 0 <= successes <= n"
        )
    p, z2 = successes / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    # At 0 and n one end is exact; rounding would leave it a hair outside.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def rate(oks: Sequence[bool]) -> dict[str, float | int]:
    """{"score", "low", "high", "n"} of verdicts, rounded to four digits."""
    low, high = wilson(sum(oks), len(oks))
    n = len(oks)
    return {"score": round(sum(oks) / n, 4), "low": round(low, 4), "high": round(high, 4), "n": n}


def percent(found: dict[str, float | int]) -> str:
    """A rate in words for a title."""
    return f"{found['score']:.1%} ({found['low']:.1%} to {found['high']:.1%}, n = {found['n']})"
