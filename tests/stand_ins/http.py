"""What the tests of `d2m serve` share: the embedded bundle served by a thread or a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from runtime.serve.app import make_app
from runtime.serve.server import Server, listen
from runtime.serve.service import Service

ROOT = Path(__file__).resolve().parents[2]
PATH = "/v1/images/generations"


@contextmanager
def running(
    key: str | None = None, origins: tuple[str, ...] = (), **options: Any
) -> Iterator[tuple[str, Service]]:
    """(address, service) of a server in a thread of this process, closed at the end."""
    service = Service(options.pop("bundle", None), "ort", threads=1, **options)
    service.start()
    with listen("127.0.0.1", 0) as listener:
        app = make_app(service, key, {"127.0.0.1", "localhost"}, origins=origins)
        server = uvicorn.Server(Server(app, service, 0).config)  # a draining service is not the end
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
        finally:
            service.close()
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


@contextmanager
def process(*arguments: str, **env: str) -> Iterator[tuple[str, subprocess.Popen[str], list[str]]]:
    """(address, process, lines of its stderr so far) of `d2m serve --port 0`."""
    command = [sys.executable, "-m", "d2m", "serve", "--port", "0", *arguments]
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "D2M_THREADS": "1", **env},
    )
    lines: list[str] = []

    def read() -> None:
        assert started.stderr is not None
        for line in started.stderr:
            lines.append(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        found = until(lambda: re.search(r"at (http://\S+)", "".join(lines)), 120)
        yield found[1], started, lines
    finally:
        if started.poll() is None:
            started.kill()
        started.wait(30)
        reader.join(10)


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `condition` gives once that is true; the test fails where it does not become so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := condition():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"nothing true within {seconds} s")
