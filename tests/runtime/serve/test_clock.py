"""A server's clock jumps by years between any two questions: no deadline or duration moves.

With the system's clock (libfaketime): python -m scripts.faults --clock.
"""

import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from tests.stand_ins.http import PATH, running, until

YEAR = 365 * 86_400.0


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer of time.time is a year before or after the one before."""
    real, turns = time.time, itertools.cycle((-YEAR, 0.0, YEAR))
    monkeypatch.setattr(time, "time", lambda: real() + next(turns))


def test_deadlines_and_durations_do_not_ask_the_clock(jumping: None) -> None:
    def post(**fields: Any) -> tuple[Any, float]:
        began = time.monotonic()
        answer = httpx.post(url + PATH, json={"prompt": "a", **fields}, timeout=120)
        return answer, time.monotonic() - began

    with running(max_queue=1, max_batch=1) as (url, service):
        answer, took = post(steps=2)
        told = answer.json()["d2m"]
        assert answer.status_code == 200
        assert 0 <= told["seconds_queued"] + told["seconds_generating"] <= took + 0.1
        answer, took = post(steps=100, n=10, deadline=0.3)
        assert answer.status_code == 504 and 0.2 < took < 20
        until(service.idle)
        with ThreadPoolExecutor(6) as pool:
            calls = [pool.submit(post, steps=20, guidance=1 + i) for i in range(6)]
            answers = [call.result()[0] for call in calls]
        assert {each.status_code for each in answers} == {200, 429}
        late = [each.headers["retry-after"] for each in answers if each.status_code == 429]
        assert all(1 <= int(seconds) <= 60 for seconds in late)
        text = httpx.get(url + "/metrics").text
    sums = re.findall(r"^d2m_\w+_seconds_sum (\S+)$", text, re.M)
    assert len(sums) == 3 and all(0 <= float(value) < 300 for value in sums)
