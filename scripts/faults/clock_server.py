"""A server whose clock jumps: answers, deadlines, Retry-After and its end take as long as ever."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from scripts.faults.forked_commands import Tools
from scripts.faults.tries import rest

PATH = "/v1/images/generations"
DEADLINE = 1.0  # seconds
SLACK = 20.0  # seconds that a busy machine may be late; a jump is a year


def served(
    tools: Tools, wrong_by: Callable[[int], None], courses: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """`d2m serve` on the tiny bundle; requests are under way whenever the clock jumps."""
    row: dict[str, Any] = {"tries": 0, "drawn": 0, "refused_429": 0, "deadlines": 0, "failures": []}
    command = [sys.executable, "-m", "d2m", "serve", str(tools.bundles["a"]), "--port", "0"]
    command += ["--max-queue", "2", "--max-steps", "1000", "--max-batch", "1"]
    environment = os.environ | {"D2M_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            url = ""
            for line in server.stderr:
                if found := re.search(r"at (http://\S+)", line):
                    url = found[1]
                    break
            drain = threading.Thread(target=server.stderr.read, daemon=True)
            drain.start()
            for course in courses:
                wrong_by(course[0])
                before = time.time()
                jump = threading.Timer(0.5, wrong_by, [course[1]])
                jump.start()
                row["tries"] += 1
                one_course(url, course, before, row)
                jump.join()
                check_metrics(url, course, row)
            end(server, wrong_by, row)
        finally:
            wrong_by(0)
            server.kill()
    return row


def one_course(url: str, course: tuple[int, int], before: float, row: dict[str, Any]) -> None:
    """More requests than the queue takes, one of them too long for its deadline."""
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        late = pool.submit(post, url, steps=1000, n=10, deadline=DEADLINE)
        rest(0.2)
        calls = [pool.submit(post, url, steps=2, seed=i, guidance=1 + i) for i in range(6)]
        status, _, answer, took = late.result()
        answers = [call.result() for call in calls]

    def fail(text: str) -> None:
        row["failures"].append(f"{course}: {text}")

    row["deadlines"] += status == 504
    if status != 504 or not DEADLINE - 0.1 <= took <= DEADLINE + SLACK:
        fail(f"a deadline of {DEADLINE} s ended with {status} after {took:.2f} s")
    for status, headers, answer, _ in answers:
        if status == 200:
            row["drawn"] += 1
            figures = answer["d2m"]
            seconds = figures["seconds_queued"], figures["seconds_generating"]
            if min(seconds) < 0 or sum(seconds) > time.monotonic() - began + 1:
                fail(f"an answer names {seconds} s")
            if course[0] and abs(answer["created"] - before) > 3600 + abs(course[1] - course[0]):
                fail(f"created is {answer['created']}, expected the server's clock")
        elif status == 429:
            row["refused_429"] += 1
            if not 1 <= int(headers.get("retry-after", 0)) <= 600:
                fail(f"Retry-After is {headers.get('retry-after')}")
        else:
            fail(f"{status}: {answer}")
    for path in ("/healthz", "/readyz"):
        if get(url + path)[0] != 200:
            fail(f"{path} is not 200")


def check_metrics(url: str, course: tuple[int, int], row: dict[str, Any]) -> None:
    """No histogram has a year, or less than nothing, in its sum."""
    text = get(url + "/metrics")[1].decode()
    for name, value in re.findall(r"^(d2m_\w+_seconds_sum) (\S+)$", text, re.M):
        if not 0 <= float(value) < 3600:
            row["failures"].append(f"{course}: {name} is {value}")


def end(server: Any, wrong_by: Callable[[int], None], row: dict[str, Any]) -> None:
    """SIGTERM, and the clock jumps while it goes down."""
    began = time.monotonic()
    server.send_signal(signal.SIGTERM)
    wrong_by(-365 * 86_400)
    while server.poll() is None and time.monotonic() < began + 60:
        rest(0.05)
    row["seconds_to_end"] = round(time.monotonic() - began, 2)
    if server.returncode != 0:
        row["failures"].append(f"SIGTERM: exit code {server.returncode}, expected 0")


def post(url: str, **fields: Any) -> tuple[int, Any, Any, float]:
    """Status, headers, JSON and seconds of one request."""
    body = json.dumps({"prompt": "a red circle", **fields}).encode()
    request = urllib.request.Request(
        url + PATH, body, headers={"content-type": "application/json"}, method="POST"
    )
    began = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            received = answer.status, answer.headers, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        received = error.code, error.headers, json.loads(error.read())
    return *received, time.monotonic() - began


def get(url: str) -> tuple[int, bytes]:
    """Status and body."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
