"""Negative prompts behind HTTP and NVIDIA Triton: a family that has them, at a tiny size."""

import base64
import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from PIL import Image

from export.triton import write_repository
from runtime.image import settings_of, to_png
from runtime.pipeline import Pipeline
from runtime.serve.service import Service
from tests.stand_ins.http import PATH, running, until
from tests.stand_ins.triton import Server, TritonError

SIZE = "16x16"
ROWS: list[dict[str, Any]] = [
    {"prompt": "a red circle", "seed": 1, "negative_prompt": "a black star"},
    {"prompt": "a red circle", "seed": 1},
    {"prompt": "a red circle", "seed": 1, "negative_prompt": "a red circle"},
    {"prompt": "two squares", "seed": 2, "negative_prompt": "circle", "n": 2},
    {"prompt": "two squares", "seed": 5, "negative_prompt": ""},
]


@pytest.fixture(scope="module")
def served(tiny_guided_bundle: Path) -> Iterator[tuple[str, Service]]:
    with running(bundle=tiny_guided_bundle) as found:
        yield found


def post(url: str, **fields: Any) -> Any:
    return httpx.post(url + PATH, json={"steps": 2, "guidance": 4, **fields}, timeout=120)


def pngs(answer: Any) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(row["b64_json"]) for row in answer.json()["data"]]


def test_rows_stay_with_their_requests_whoever_shares_the_batch(
    served: tuple[str, Service],
) -> None:
    url, service = served
    threads, held = service.threads, []
    images = threads.images

    def count(batch: Any, min_batch: int) -> Any:
        if not held:  # the first is held until the others have met in the queue
            until(lambda: len(service.jobs) == len(ROWS))
        held.append(len(batch))
        return images(batch, min_batch)

    threads.images = count  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(9) as pool:
            first = pool.submit(post, url, prompt="x", steps=3)
            until(lambda: threads.active)
            calls = [pool.submit(post, url, **row) for row in ROWS]
            together = [pngs(call.result()) for call in calls]
            pngs(first.result())
    finally:
        threads.images = images  # type: ignore[method-assign]
    min_batch = service.min_batches.of(next(iter(asked(service, ROWS[:1]))))
    assert min_batch is None or max(held) == len(ROWS)
    for row, before in zip(ROWS, together, strict=True):
        assert pngs(post(url, **row)) == before
        said = settings_of(Image.open(io.BytesIO(before[0])))
        assert said.get("negative", "") == row.get("negative_prompt", "")
        again = Pipeline(service.pipeline.bundle, "ort", threads=1, min_batch=said["batch"])
        negative, steps = row.get("negative_prompt"), {"steps": 2, "guidance": 4.0}
        image = again(row["prompt"], seed=row["seed"], negative=negative, **steps)
        assert not isinstance(image, list) and to_png(image) == before[0]
    assert len({images[0] for images in together[:3]}) == 3  # each negative prompt told


def asked(service: Service, rows: list[dict[str, Any]]) -> Iterator[Any]:
    import json

    from runtime.serve.image_request import read_request

    for row in rows:
        body = json.dumps({"steps": 2, "guidance": 4, **row}).encode()
        yield read_request(body, service.pipeline.manifest, service.limits).arguments


def test_openais_client_gives_one_as_an_extra_field(served: tuple[str, Service]) -> None:
    openai = pytest.importorskip("openai")
    url, service = served
    client = openai.OpenAI(base_url=url + "/v1", api_key="unused", max_retries=0)
    answer = client.images.generate(
        prompt="a red circle",
        extra_body={"negative_prompt": "a black star", "steps": 2, "guidance": 4, "seed": 1},
    )
    assert base64.b64decode(answer.data[0].b64_json) == pngs(post(url, **ROWS[0]))[0]
    assert httpx.get(url + "/v1/models").json()["data"][0]["negative_prompt"] is True


def test_it_is_in_no_log_and_of_limited_size(
    served: tuple[str, Service], caplog: pytest.LogCaptureFixture
) -> None:
    url, service = served
    with caplog.at_level(logging.DEBUG):
        pngs(post(url, prompt="a", negative_prompt="a secret fear"))
        assert post(url, prompt="a", negative_prompt="a secret fear", steps=0).status_code == 400
        most = service.limits.prompt
        refused = post(url, prompt="a", negative_prompt="z" * (most + 1)).json()["error"]
        until(lambda: caplog.text.count(" 400 ") >= 2)
    assert refused["param"] == "negative_prompt" and f"0 to {most} characters" in refused["message"]
    lines = [r.getMessage() for r in caplog.records if r.name.startswith(("runtime", "uvicorn"))]
    assert any(" 200 " in line for line in lines)
    # No digit of a request's hexadecimal name is a z.
    assert not any("secret" in line or "zzz" in line for line in lines)


@pytest.fixture(scope="module")
def triton(tiny_guided_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    path = tmp_path_factory.mktemp("triton")
    return Server(path / write_repository(tiny_guided_bundle, path, max_batch=4)["model"])


def test_triton_draws_with_negative_prompts(triton: Server, tiny_guided_bundle: Path) -> None:
    base: dict[str, Any] = {"prompt": [["a red circle"]], "seed": [[1]], "steps": [[2]]}
    base["guidance"] = [[4.0]]
    rows = [base, base | {"negative_prompt": [["a black star"]]}]
    answers = triton.infer(*(triton.request(row, ("image",)) for row in rows))
    pipeline = Pipeline(tiny_guided_bundle, "ort", max_batch=4)
    pipeline.min_batch = triton.model.model.min_batches.of(first_of(triton, rows[0])) or 0
    for negative, answer in zip((None, "a black star"), answers, strict=True):
        assert not isinstance(answer, TritonError), answer.message()
        drawn = pipeline("a red circle", seed=1, steps=2, guidance=4.0, negative=negative)
        assert np.abs(np.asarray(drawn, int) - answer["image"][0]).max() <= 1
    assert (answers[0]["image"] != answers[1]["image"]).any()  # type: ignore[index]


def first_of(triton: Server, row: dict[str, Any]) -> Any:
    return triton.model.model.read(0, triton.request(row)).arguments


def test_triton_takes_one_for_every_prompt_and_refuses_other_counts(triton: Server) -> None:
    two: dict[str, Any] = {"prompt": [["a"], ["b"]], "steps": [[1], [1]], "seed": [[1], [2]]}
    found = first_of(triton, two | {"negative_prompt": [["c"], ["d"]], "guidance": [[4.0]] * 2})
    assert found.negative == ["c", "d"]
    bad = triton.request({"prompt": [["a"]], "negative_prompt": [[b"\xff"]]})
    (refused,) = triton.infer(bad)
    assert isinstance(refused, TritonError) and "negative prompt is" in refused.message()
