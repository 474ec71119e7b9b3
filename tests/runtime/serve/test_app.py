"""The API as OpenAI's own client calls it, and what a server must withstand."""

import base64
import io
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
import numpy as np
from PIL import Image

from runtime.image import settings_of, to_png
from runtime.regenerate import ARGUMENTS
from runtime.serve.image_request import MAX_BODY
from runtime.serve.service import Service
from tests.stand_ins.http import PATH, running, until

Server = tuple[str, Service]
STEP = {"steps": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(max_queue=2) as found:
        yield found


def post(url: str, timeout: float = 120, **fields: Any) -> Any:
    return httpx.post(url + PATH, json={"prompt": "a", "steps": 1, **fields}, timeout=timeout)


def metric(url: str, name: str) -> float:
    lines = httpx.get(url + "/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_openais_client_streams(server: Server) -> None:
    """Its images are those without streaming; comments between say how far it is."""
    openai = pytest.importorskip("openai")
    url, service = server
    client = openai.OpenAI(base_url=url + "/v1", api_key="unused", max_retries=0)
    fields = {"prompt": "a photo of a red circle", "n": 2, "extra_body": {"steps": 3, "seed": 7}}
    whole = client.images.generate(**fields)
    found = list(client.images.generate(**fields, stream=True))
    assert [item.type for item in found] == ["image_generation.completed"] * 2
    for item, other in zip(found, whole.data, strict=True):
        first, second = (
            np.asarray(Image.open(io.BytesIO(base64.b64decode(each.b64_json))))
            for each in (item, other)
        )
        assert np.array_equal(first, second)
    body = {"prompt": "a", "steps": 3, "stream": True}
    with httpx.stream("POST", url + PATH, json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line.startswith(":")]
    assert lines == [f": step {done} of 3" for done in range(4)]


def test_errors_of_a_stream(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step an error has its own status; afterwards it is an event."""
    url, service = server
    refused = post(url, stream=True, steps=0)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "steps"
    late = post(url, stream=True, steps=100, deadline=0.05)
    assert late.status_code in (200, 504)
    real = service.pipeline.__class__.__call__

    def fail(self: Any, *arguments: Any, progress: Any = None, **options: Any) -> Any:
        progress("denoise", 0, 4)
        time.sleep(0.5)  # the answer has begun by then
        raise RuntimeError("broken")

    monkeypatch.setattr(service.pipeline.__class__, "__call__", fail)
    answer = post(url, stream=True)
    monkeypatch.setattr(service.pipeline.__class__, "__call__", real)
    assert answer.status_code == 200 and "event: error" in answer.text
    [data] = [line for line in answer.text.splitlines() if line.startswith("data:")]
    assert json.loads(data[5:])["error"]["type"] == "server_error"


def test_openais_client(server: Server) -> None:
    openai = pytest.importorskip("openai")
    url, service = server
    client = openai.OpenAI(base_url=url + "/v1", api_key="unused", max_retries=0)
    answer = client.images.generate(
        model=service.pipeline.bundle.name,
        prompt="a photo of a red circle",
        n=2,
        size="32x32",
        response_format="b64_json",
        extra_body={"steps": 3, "guidance": 2.5, "seed": 7, "top_k": 2},
    )
    assert answer.created > 1.7e9 and len(answer.data) == 2
    for i, item in enumerate(answer.data):
        png = base64.b64decode(item.b64_json)
        said = settings_of(Image.open(io.BytesIO(png)))
        assert said["prompt"] == "a photo of a red circle" and said["seed"] == 7 + i
        assert (said["steps"], said["guidance"], said["top_k"]) == (3, 2.5, 2)
        # What the image says of itself draws it again, to the last byte.
        knobs = {name: said[name] for name in ARGUMENTS if name in said}
        pipeline = service.pipeline
        again = type(pipeline)(pipeline.bundle, "ort", threads=1, min_batch=said["batch"])
        assert to_png(again(**knobs)) == png
    assert [model.id for model in client.models.list()] == ["shapes-s"]


def test_openais_client_gets_its_errors(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server[0] + "/v1", api_key="unused", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="expected one of 0, 1, 2, 4") as caught:
        client.images.generate(prompt="a", extra_body={"top_k": 3})
    assert caught.value.param == "top_k" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="the model is 'dall-e-3'"):
        client.images.generate(prompt="a", model="dall-e-3")


def test_an_answer_tells_blocks_and_experts(server: Server) -> None:
    answer = post(server[0], steps=2, top_k=1, seed=3).json()
    told = answer["d2m"]
    assert (told["blocks"], told["blocks_of"]) == (24, 36)  # six of 18 are left out
    assert (told["experts_per_token"], told["experts_of"]) == (1, 12)
    assert told["bundle"] == server[1].pipeline.bundle.digest
    assert told["seconds_generating"] > 0 and answer["data"][0]["seed"] == 3


def test_a_full_queue_says_429_and_when_to_come_back(server: Server) -> None:
    url, service = server
    with ThreadPoolExecutor(9) as pool:
        # Different guidance: none shares a batch, so that one is drawn, two wait, six are refused.
        calls = [pool.submit(post, url, steps=30, guidance=1 + i) for i in range(9)]
        answers = [call.result() for call in calls]
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) == {200, 429} and codes.count(200) >= 3, codes
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
    assert until(service.idle)


def test_deadlines(server: Server) -> None:
    url, service = server
    before = metric(url, 'd2m_cancelled_total{reason="deadline"}')
    answer = post(url, steps=100, deadline=0.2)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
    assert metric(url, 'd2m_cancelled_total{reason="deadline"}') == before + 1
    until(lambda: not service.threads.active)
    assert post(url).status_code == 200


def test_a_client_that_goes_away_stops_its_drawing(server: Server) -> None:
    url, service = server
    steps = metric(url, "d2m_steps_total")
    body = json.dumps({"prompt": "a", "steps": 100}).encode()
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: metric(url, "d2m_steps_total") > steps)
    until(lambda: metric(url, 'd2m_cancelled_total{reason="disconnect"}') >= 1)
    until(lambda: not service.threads.active)
    assert metric(url, "d2m_steps_total") < steps + 100
    assert post(url).status_code == 200


def test_what_is_no_request(server: Server) -> None:
    url, _ = server
    large = httpx.post(
        url + PATH, content=b" " * (MAX_BODY + 1), headers={"content-type": "application/json"}
    )
    chunked = httpx.post(
        url + PATH, content=iter([b" " * 40_000] * 3), headers={"content-type": "application/json"}
    )
    typed = httpx.post(url + PATH, content=b"{}", headers={"content-type": "text/plain"})
    wrong = httpx.post(url + PATH, content=b"{", headers={"content-type": "application/json"})
    path, method = httpx.get(url + "/v1/none"), httpx.get(url + PATH)
    other = httpx.get(url + "/", headers={"host": "elsewhere.example"})
    codes = {413: large, 415: typed, 400: wrong, 404: path, 405: method, 421: other}
    for code, answer in [*codes.items(), (413, chunked)]:
        assert answer.status_code == code
        message = answer.json()["error"]["message"]
        assert message.endswith(".") and "\n" not in message


def test_health_and_metrics(server: Server) -> None:
    url, service = server
    assert httpx.get(url + "/healthz").json() == {"status": "ok"}
    assert httpx.get(url + "/readyz").status_code == 200
    drawn = metric(url, "d2m_images_total")
    post(url, n=2)
    assert metric(url, "d2m_images_total") == drawn + 2
    assert metric(url, "d2m_queue_requests") == metric(url, "d2m_generating_requests") == 0
    assert metric(url, "d2m_step_seconds_count") == metric(url, "d2m_steps_total")
    assert metric(url, "process_resident_memory_bytes") > 1e7
    names = httpx.get(url + "/metrics").text
    for name in ("requests_total", "queue_seconds", "blocks_run_total", "batch_images"):
        assert f"d2m_{name}" in names
    assert 'd2m_expert_load_known{reason=""} 1.0' in names
    service.meter._due = 0.0  # in place of a hundred steps' time
    post(url, steps=2)
    until(lambda: metric(url, "d2m_expert_load_steps_total") > 0)
    component = service.pipeline.bundle.component("transformer")
    routed = [row for row in component["program"] if row["type"] in ("double", "single")]
    text = httpx.get(url + "/metrics").text
    most = 2 * 32 * len(routed) * metric(url, "d2m_expert_load_steps_total")
    assert 0 < metric(url, "d2m_expert_tokens_total") <= most
    ratios = re.findall(r'd2m_expert_load_ratio\{ffn="\S+"\} (\S+)', text)
    assert ratios and all(1 <= float(ratio) <= 12 for ratio in ratios)
    assert text.count("d2m_expert_tokens_total{") == 12 * len(ratios)
    service.draining = True
    try:
        refused = post(url)
        assert httpx.get(url + "/readyz").status_code == refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
    finally:
        service.draining = False


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats_know_how_they_were_made(server: Server, kind: str) -> None:
    url, service = server
    prompt = 'a "red" circle \u2764 \U0001f600'
    files = []
    for compression in (100, 10):
        answer = post(
            url, prompt=prompt, seed=3, output_format=kind, output_compression=compression
        ).json()
        assert answer["output_format"] == kind
        files.append(base64.b64decode(answer["data"][0]["b64_json"]))
    assert len(files[1]) < len(files[0])
    image = Image.open(io.BytesIO(files[0]))
    assert image.format == kind.upper() and image.size == (32, 32)
    said = settings_of(image)
    assert said["prompt"] == prompt and (said["seed"], said["steps"]) == (3, 1)
    png = Image.open(
        io.BytesIO(base64.b64decode(post(url, prompt=prompt, seed=3).json()["data"][0]["b64_json"]))
    )
    assert settings_of(png) == said
    difference = np.abs(np.asarray(image, int) - np.asarray(png, int))
    assert difference.mean() < 8


def test_what_was_not_done_as_asked_is_said(server: Server) -> None:
    answer = post(server[0], size="1024x1024", quality="hd")
    notes = ["size 1024x1024 became 32x32", "quality hd has no effect"]
    assert answer.headers["x-d2m-notes"] == " | ".join(notes)
    assert answer.json()["d2m"]["notes"] == notes and answer.json()["size"] == "32x32"
    long = post(server[0], prompt="circle " * 400)
    said = (
        r"(tokenizer\w*) reads 16 tokens; the last \d+ of a prompt of 2800 characters were left out"
    )
    cut = long.json()["d2m"]["notes"]
    found = [match[1] for note in cut if (match := re.fullmatch(said, note))]
    assert found == ["tokenizer", "tokenizer_2"]
    assert long.headers["x-d2m-notes"] == " | ".join(cut)
    plain = post(server[0])
    assert "x-d2m-notes" not in plain.headers and plain.json()["d2m"]["notes"] == []


def test_head_is_answered_where_get_is(server: Server) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/", "/v1/models"):
        head = httpx.head(server[0] + path)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-type"] == httpx.get(server[0] + path).headers["content-type"]


def test_the_schema_tells_the_fields(server: Server) -> None:
    schema = httpx.get(server[0] + "/openapi.json").json()
    body = schema["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "negative_prompt" in body["properties"] and body["required"] == ["prompt"]


def test_a_model_by_its_names() -> None:
    openai = pytest.importorskip("openai")
    names = ("dall-e-3", "us/shapes", "dall-e-3")
    with running(aliases=names, max_batch=1) as (url, service):
        client = openai.OpenAI(base_url=url + "/v1", api_key="unused", max_retries=0)
        listed = [model.id for model in client.models.list()]
        assert listed == service.names == ["shapes-s", "dall-e-3", "us/shapes"]
        for name in listed:
            assert client.models.retrieve(name).id == name
        answer = client.images.generate(
            model="dall-e-3", prompt="a", quality="standard", size="1024x1024", extra_body=STEP
        )
        assert len(answer.data) == 1
        with pytest.raises(openai.NotFoundError, match="the model is 'other', expected 'shapes-s'"):
            client.models.retrieve("other")
    with pytest.raises(ValueError, match="model-alias is '', expected 1 to 200 characters"):
        Service(None, "ort", aliases=[""])


def test_pages_of_other_sites_call_it_where_the_option_names_them() -> None:
    site, other = "https://app.example", "https://evil.example"
    ask = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type, x-stainless-os",
    }
    with running(key="a-good-long-key", origins=(site,), max_batch=1) as (url, _):
        before = httpx.options(url + PATH, headers={"origin": site, **ask})
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == site
        assert "x-stainless-os" in before.headers["access-control-allow-headers"]
        assert httpx.options(url + PATH, headers={"origin": other, **ask}).status_code == 400
        headers = {"origin": site, "authorization": "Bearer a-good-long-key"}
        answer = httpx.post(url + PATH, json={"prompt": "a", **STEP}, headers=headers, timeout=120)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == site
        assert "x-d2m-notes" in answer.headers["access-control-expose-headers"]
        refused = httpx.post(url + PATH, json={"prompt": "a"}, headers={"origin": site})
        assert refused.status_code == 401  # which the page may read
        assert refused.headers["access-control-allow-origin"] == site


def test_no_option_no_other_sites(server: Server) -> None:
    answer = httpx.get(server[0] + "/v1/models", headers={"origin": "https://app.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_the_key() -> None:
    with running(key="a-good-long-key") as (url, _):
        assert httpx.get(url + "/v1/models").status_code == 401
        wrong = httpx.post(
            url + PATH, json={"prompt": "a"}, headers={"authorization": "Bearer a-good-long-kez"}
        )
        assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "invalid_api_key"
        right = {"authorization": "Bearer a-good-long-key"}
        assert httpx.get(url + "/v1/models", headers=right).status_code == 200
        assert httpx.get(url + "/healthz").status_code == httpx.get(url + "/").status_code == 200


def test_no_prompt_is_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        post(server[0], prompt="a secret wish")
        post(server[0], prompt="a secret wish", top_k=3)
        until(lambda: " 400 " in caplog.text)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith(("runtime", "uvicorn"))]
    assert any("POST" in line and " 200 " in line for line in lines)
    assert not any("secret" in line for line in lines)


def test_many_at_once_all_get_what_they_would_alone(server: Server) -> None:
    url, service = server
    asked = [{"seed": i, "steps": 2, "prompt": f"a photo of {i} squares"} for i in range(8)]
    gate = threading.Barrier(len(asked))

    def one(fields: dict[str, Any]) -> bytes:
        gate.wait()
        while (answer := post(url, **fields)).status_code == 429:
            pass
        assert answer.status_code == 200
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(one, asked))
    for fields, png in zip(asked, together, strict=True):
        alone = post(url, **fields).json()["data"][0]["b64_json"]
        assert base64.b64decode(alone) == png
