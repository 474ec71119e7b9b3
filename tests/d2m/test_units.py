"""Quantities as people read them."""

import pytest

from d2m.units import bytes_text, clock, count_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (75, "1:15"), (3600, "1:00:00")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_human():
    assert [count_text(n) for n in (96, 812_000, 11_400_000, 5_147_000_000)] == [
        "96",
        "812 k",
        "11.4 M",
        "5.15 B",
    ]


def test_shown():
    assert [bytes_text(size) for size in (12.34e9, 1e9, 8.4e8)] == ["12.3 GB", "1.0 GB", "840 MB"]
