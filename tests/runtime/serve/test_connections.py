"""Connections: what a client that is slow, silent or rude costs, over raw sockets."""

import logging
import re
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
import runtime.serve.connections as connections
from runtime.serve.service import Service
from tests.stand_ins.http import PATH, process, running, until

HEAD = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    with running() as found:
        yield found


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        yield client


def answer(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of one answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length
    while len(body) < int(length[1]):
        body += client.recv(65536)
    return int(head.split()[1]), body


def ask(client: socket.socket, host: str = "localhost") -> int:
    client.sendall(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    return answer(client)[0]


def closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


def test_a_kept_connection_answers_at_once(server: tuple[str, Service]) -> None:
    """Without TCP_NODELAY each answer takes 44 ms, the client's delayed acknowledgement."""
    with connected(server[0]) as client:
        times = []
        for _ in range(15):
            began = time.perf_counter()
            assert ask(client) == 200
            times.append(time.perf_counter() - began)
    assert min(times[1:]) < 0.03


def test_a_client_that_leaves_in_mid_body_is_one_line_of_log(
    server: tuple[str, Service], caplog: pytest.LogCaptureFixture
) -> None:
    url, service = server
    gone = service.metrics.cancelled.labels("disconnect")._value.get()
    with caplog.at_level(logging.INFO):
        with connected(url) as client:
            client.sendall(f'{HEAD}Content-Length: 500\r\n\r\n{{"prompt": "a'.encode())
            time.sleep(0.2)
        until(lambda: f"POST {PATH} " in caplog.text)
        time.sleep(0.2)
    (record,) = [r for r in caplog.records if r.name.startswith(("runtime", "uvicorn"))]
    assert f"POST {PATH} 499 " in record.getMessage() and record.exc_info is None
    assert service.metrics.cancelled.labels("disconnect")._value.get() == gone + 1


@pytest.mark.parametrize("size", ["FFFFFFFFFFFFFFFF", "F" * 20, "20000"])
def test_a_chunk_of_absurd_size_is_refused_when_it_is_announced(
    server: tuple[str, Service], size: str
) -> None:
    with connected(server[0]) as client:
        began = time.monotonic()
        client.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{size}\r\nab".encode())
        status, body = answer(client)
        assert status == 413 and b"the body is too large" in body
        assert time.monotonic() - began < 5  # far from the time that a body may take


def test_a_chunk_size_that_is_no_number_is_refused(server: tuple[str, Service]) -> None:
    with connected(server[0]) as client:
        client.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{'F' * 4000}\r\n".encode())
        assert client.recv(65536).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("127.0.0.1:8000", 200),
        ("localhost:evil", 421),
        ("localhost:80@evil.com", 421),
        ("localhost:", 421),
        ("localhost:123456", 421),
        ("localhost.evil.com", 421),
        ("evil.com", 421),
    ],
)
def test_hosts(server: tuple[str, Service], host: str, status: int) -> None:
    with connected(server[0]) as client:
        assert ask(client, host) == status


def test_headers_must_come_in_time(
    server: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether nothing comes, half a request, or a byte now and then; and after an answer too."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.5)
    with connected(server[0]) as silent, connected(server[0]) as half, connected(server[0]) as kept:
        half.sendall(HEAD.encode())
        assert ask(kept) == 200
        kept.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert closed(silent) and closed(half) and closed(kept)
    with connected(server[0]) as slow, pytest.raises(OSError):
        for byte in HEAD * 9:
            slow.sendall(byte.encode())
            time.sleep(0.02)


def test_a_request_may_take_longer_than_its_headers(
    server: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    body = b'{"prompt": "a", "steps": 1}'
    with connected(server[0]) as client:
        client.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode())
        time.sleep(1.5)
        client.sendall(body)
        assert answer(client)[0] == 200


def test_too_many_connections_close_those_that_were_silent_longest(
    server: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "most_connections", lambda: 3)
    with connected(server[0]) as first, connected(server[0]) as second:
        assert ask(first) == ask(second) == ask(first) == 200  # second is the silent one
        with connected(server[0]) as third, connected(server[0]) as fourth:
            assert ask(third) == ask(fourth) == 200
            assert closed(second)
            assert ask(first) == ask(third) == 200


def test_few_descriptors_and_many_connections() -> None:
    """200 silent connections where 128 files may be open: answers go on, and the log is short."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))  # the process inherits it
    try:
        started = process()
        url, _, lines = started.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    address = url.removeprefix("http://").split(":")
    held = [socket.create_connection((address[0], int(address[1])), 30) for _ in range(200)]
    try:
        time.sleep(0.5)
        began = time.monotonic()
        with connected(url) as client:
            assert ask(client) == 200
        assert time.monotonic() - began < 10
        text = "".join(lines)
        assert "Traceback" not in text and text.count("WARNING") == 1
        assert "those that were silent longest are closed" in text
    finally:
        for each in held:
            each.close()
        started.__exit__(None, None, None)


def test_a_process_without_descriptors_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    class Loop:
        told = 0

        def default_exception_handler(self, context: object) -> None:
            self.told += 1

    loop = Loop()
    connections._logged.clear()
    for _ in range(100):
        connections.on_fault(loop, {"exception": OSError(24, "Too many open files")})  # type: ignore[arg-type]
    assert [r.getMessage() for r in caplog.records] == [
        "no connection can be accepted: Too many open files; raise the limit (ulimit -n)"
    ]
    connections.on_fault(loop, {"exception": OSError(2, "x")})  # type: ignore[arg-type]
    assert loop.told == 1
