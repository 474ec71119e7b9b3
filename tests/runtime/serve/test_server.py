"""The process: its options, its signals, its refusals."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from tests.stand_ins.http import PATH, ROOT, process, until


def draw(url: str, steps: int, **headers: str) -> "httpx.Response":
    body = {"prompt": "a", "steps": steps}
    return httpx.post(url + PATH, json=body, headers=headers, timeout=120)


def drawing_and_waiting(url: str) -> tuple[float, float]:
    """How many requests are being drawn, and how many wait: both, for one may not have come."""
    lines = httpx.get(url + "/metrics").text.splitlines()
    told = dict(line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
    return float(told["d2m_generating_requests"]), float(told["d2m_queue_requests"])


def test_sigterm_lets_every_accepted_request_end() -> None:
    with process("--max-batch", "1", "--drain", "300") as (url, server, lines):
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(draw, url, 20) for _ in range(3)]
            until(lambda: drawing_and_waiting(url) == (1, 2))
            server.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(url + "/readyz").status_code == 503)
            late = draw(url, 1)
            assert late.status_code == 503 and late.headers["retry-after"]
            assert [call.result().status_code for call in calls] == [200, 200, 200]
        assert server.wait(60) == 0
        assert "Traceback" not in "".join(lines)
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/readyz")


def test_what_does_not_end_in_time_gets_a_503_and_the_process_ends() -> None:
    with process("--drain", "0.2", "--max-batch", "1") as (url, server, lines):
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(draw, url, 100) for _ in range(2)]
            until(lambda: drawing_and_waiting(url) == (1, 1))
            server.send_signal(signal.SIGINT)
            for call in calls:
                assert call.result().status_code == 503
                assert "stopped" in call.result().json()["error"]["message"]
        assert server.wait(60) == 0
        assert "Traceback" not in "".join(lines)


def test_the_key_comes_from_the_environment_and_prompts_are_logged_when_asked() -> None:
    with process("--log-prompts", D2M_API_KEY="from-the-environment") as (url, _, lines):
        assert draw(url, 1).status_code == 401
        assert draw(url, 1, authorization="Bearer from-the-environment").status_code == 200
        until(lambda: "prompt 'a'" in "".join(lines))
        assert "from-the-environment" not in "".join(lines)


def test_a_server_for_others_without_a_key_warns() -> None:
    with process("--host", "0.0.0.0", "--model-alias", "dall-e-3") as (url, _, lines):
        port = url.rpartition(":")[2]
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/models/dall-e-3")
        assert answer.json()["id"] == "dall-e-3"
        said = "0.0.0.0 is open to the network and no API key is required: set D2M_API_KEY"
        assert said in "".join(lines)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--port", "70000"], "the port is 70000"),
        (["--workers", "0"], "workers is 0"),
        (["--max-queue", "0"], "max-queue is 0"),
        (["--host", "no.such.host.invalid"], "the host is 'no.such.host.invalid'"),
        (["--deadline", "0"], "the deadline is 0"),
        (["--model-alias", ""], "model-alias is ''"),
        (["nowhere"], "is no directory"),
        (["--api-key-file", "/nowhere"], "cannot use '/nowhere'"),
        (["--api-key-file", os.devnull], "the API key is too short"),
    ],
)
def test_refusals(arguments: list[str], sentence: str) -> None:
    command = [sys.executable, "-m", "d2m", "serve", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and sentence in errors[0], done.stderr


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "d2m", "serve", "--port", port]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"error: cannot listen on 127.0.0.1 port {port}: address already" in done.stderr
