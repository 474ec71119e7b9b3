"""The number of threads: argument, environment, cores."""

import os

import pytest

from runtime.program.threads import SMALL, physical_cores, thread_count


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("D2M_THREADS", raising=False)
    assert thread_count() == physical_cores() == thread_count(None, SMALL + 1)
    assert thread_count(None, SMALL) == 1 and thread_count(4, SMALL) == 4
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
    monkeypatch.setenv("D2M_THREADS", "3")
    assert thread_count() == thread_count(None, 1) == 3 and thread_count(2) == 2
    for text in ("0", "-1", "two", "1.5", "99999"):
        monkeypatch.setenv("D2M_THREADS", text)
        with pytest.raises(ValueError, match="D2M_THREADS|number of threads"):
            thread_count()
    for value in (0, True, 1.0):
        with pytest.raises(ValueError, match="the number of threads is"):
            thread_count(value)  # type: ignore[arg-type]
