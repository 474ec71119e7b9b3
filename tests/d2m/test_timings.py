"""What is remembered of earlier builds, and what a person is told of it."""

from pathlib import Path

import pytest

from d2m import console, timings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "d2m" / "timings.json"


def test_remembered_by_item(cache: Path) -> None:
    assert timings.expected("plans (x)", 4) is None
    timings.remember("plans (x)", 30.0, 10)
    assert timings.expected("plans (x)", 4) == 12.0 and timings.expected("plans (y)", 4) is None
    timings.remember("plans (x)", 20.0, 10)
    assert timings.expected("plans (x)", 4) == 8.0  # the latest counts
    for phase, seconds, items in (("write a", 50.0, 5), ("plans (z)", 0.2, 5), ("trace t", 9, 0)):
        timings.remember(phase, seconds, items)
        assert timings.expected(phase, 1) is None
    for number in range(150):
        timings.remember(f"trace {number}", 2.0, 1)
    assert len(timings.known()) == timings.LIMIT and timings.expected("trace 149", 3) == 6.0


@pytest.mark.parametrize("text", ["", "[]", '{"plans (x)": "soon", "trace": -1, "plans": 1e99}'])
def test_a_broken_cache_is_no_cache(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    assert timings.known() == {}
    timings.remember("plans (x)", 30.0, 10)
    assert timings.known() == {"plans (x)": 3.0}


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    timings.remember("plans (x)", 30.0, 10)
    assert timings.known() == {}


def test_a_silent_phase_says_how_long_it_took_before(capsys: pytest.CaptureFixture[str]) -> None:
    timings.remember("plans (x)", 30.0, 10)
    times = iter([0.0, 5.0, 12.0, 13.0, 24.0, 25.0, 61.0, 80.0, 81.0])
    lines = console._lines(lambda: next(times))
    lines("plans (x)", 0, 20)
    lines.tick()  # at 5 s: it has just spoken
    lines.tick()  # 12 s
    lines("plans (x)", 1, 20)
    lines.tick()  # 24 s
    lines.tick()
    lines("plans (x)", 20, 20)
    lines.tick()  # over: nothing to say
    assert capsys.readouterr().err.splitlines() == [
        "plans (x): 0/20, about 1:00 by earlier builds",
        "plans (x): 0/20, 0:12, 0:48 left",
        "plans (x): 1/20, 0:24, 0:36 left",
        "plans (x): 20/20, 1:01",
    ]
    assert timings.expected("plans (x)", 1) == pytest.approx(3.05)
