"""A model of the repository, called as Triton Inference Server calls it
(tests/stand_ins/triton.py)."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import runtime
from export.triton import write_repository
from runtime.serve import triton
from tests.stand_ins.triton import Server, TritonError

ROOT = Path(__file__).resolve().parents[3]
DEFAULT = ROOT / "runtime" / "default"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    path = tmp_path_factory.mktemp("triton")
    return Server(path / write_repository(DEFAULT, path, max_batch=4)["model"])


@pytest.fixture
def drawn(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests every batch had."""
    sizes: list[int] = []
    images = server.model.model.images

    def count(batch: list[Any], min_batch: int) -> Any:
        sizes.append(len(batch))
        return images(batch, min_batch)

    monkeypatch.setattr(server.model.model, "images", count)
    return sizes


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def error(answer: Any, code: str) -> str:
    assert isinstance(answer, TritonError) and answer.code() == getattr(TritonError, code)
    return answer.message()


def test_a_request_draws_what_the_runtime_draws(server: Server) -> None:
    """The embedded bundle, its own settings; both outputs are the same picture."""
    request = server.request(
        {"prompt": [["a photo of a red circle"]], "seed": [[7]]}, outputs=("png", "image")
    )
    (answer,) = server.infer(request)
    assert answer["image"].shape == (1, 32, 32, 3)
    np.testing.assert_array_equal(pixels(answer["png"][0, 0]), answer["image"][0])
    pipeline = runtime.load(DEFAULT, "ort")
    pipeline.min_batch = 2  # what runtime.serve.batch_invariance finds for the whole graph
    expected = np.asarray(pipeline("a photo of a red circle", seed=7))
    assert np.abs(expected.astype(int) - answer["image"][0]).max() <= 1
    text = Image.open(io.BytesIO(answer["png"][0, 0])).text  # type: ignore[attr-defined]
    told = json.loads(next(iter(text.values())))
    assert told["seed"] == 7 and told["steps"] == 16 and len(told["bundle"]) == 64


def test_requests_share_batches_and_no_bit_depends_on_it(server: Server, drawn: list[int]) -> None:
    prompts = ["a photo of a red circle", "two blue squares", "a cross"]
    asked = [{"prompt": [[p]], "seed": [[i]], "steps": [[4]]} for i, p in enumerate(prompts)]
    together = server.infer(*(server.request(row) for row in asked))
    assert drawn == [3]
    alone = [server.infer(server.request(row))[0] for row in asked]
    for one, other in zip(together, alone):
        np.testing.assert_array_equal(pixels(one["png"][0, 0]), pixels(other["png"][0, 0]))


def test_settings_that_differ_are_drawn_apart(server: Server, drawn: list[int]) -> None:
    base = {"prompt": [["a circle"]], "steps": [[2]]}
    rows = [
        base,
        base | {"guidance": [[1.5]]},
        base | {"top_k": [[2, 2]]},
        base | {"width": [[48]]},
    ]
    answers = server.infer(*(server.request(row, ("image",)) for row in rows))
    assert sorted(drawn) == [1, 1, 2]  # top_k 2 is the bundle's own
    assert [answer["image"].shape for answer in answers] == [(1, 32, 32, 3)] * 3 + [(1, 32, 48, 3)]


def test_noise_levels_are_given_as_a_list(server: Server) -> None:
    def read(sigmas: list[float]) -> Any:
        request = server.request({"prompt": [["a"]], "sigmas": [sigmas]})
        return server.model.model.read(0, request).arguments

    assert read([1.0, 0.5]).sigmas == (1.0, 0.5) and read([0.5]).top_k == [2]


def test_where_bits_depend_on_the_batch_each_is_drawn_alone(
    server: Server, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.model.model.min_batches, "of", lambda request: None)
    row = {"prompt": [["a circle"]], "steps": [[1]]}
    server.infer(*(server.request(row) for _ in range(3)))
    assert drawn == [1, 1, 1]


def test_a_batch_holds_as_many_images_as_it_may(server: Server, drawn: list[int]) -> None:
    one, three = ({"prompt": [["a circle"]] * n, "seed": [[5]] * n, "steps": [[1]]} for n in (1, 3))
    three["steps"] = [[1]] * 3
    answers = server.infer(*(server.request(row, ("image",)) for row in (three, three, one, one)))
    assert drawn == [1, 2, 1]
    assert [len(answer["image"]) for answer in answers] == [3, 3, 1, 1]
    np.testing.assert_array_equal(answers[0]["image"][2], answers[3]["image"][0])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"prompt": [[b"\xff"]]}, "expected text in UTF-8"),
        ({"prompt": [["a"]], "steps": [[0]]}, "steps is 0"),
        ({"prompt": [["a"]], "steps": [[101]]}, "steps is 101, expected at most 100"),
        ({"prompt": [["a"]], "height": [[33]]}, "height is 33"),
        ({"prompt": [["a"]], "height": [[512]], "width": [[512]]}, "expected at most 4096 pixels"),
        ({"prompt": [["a"]], "top_k": [[3]]}, "top_k is 3"),
        ({"prompt": [["a"]], "kappa": [[4]]}, "kappa is 4"),
        ({"prompt": [["a"]], "negative_prompt": [["b"]]}, "negative is ['b'], expected none: this"),
        ({"prompt": [["a"]], "sigmas": [[0.5, 0.5]]}, "sigmas holds 0.5 after 0.5"),
        ({"prompt": [["a"]], "seed": [[-1]]}, "seed"),
        ({"prompt": [["a"]], "guidance": [[float("nan")]]}, "guidance is nan, expected finite"),
        ({"prompt": [["a"], ["b"]], "steps": [[1], [2]]}, r"steps is [1, 2] in one request"),
        ({"prompt": [["a"], ["b"]], "top_k": [[1], [2]]}, "top_k differs in one request"),
        ({"prompt": [["a"], ["b"]], "seed": [[1]]}, "seed"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_others_are_drawn(
    server: Server, inputs: dict[str, Any], words: str
) -> None:
    good = server.request({"prompt": [["a circle"]], "steps": [[1]]})
    refused, answer = server.infer(server.request(inputs), good)
    assert words in error(refused, "INVALID_ARG")
    assert pixels(answer["png"][0, 0]).shape == (32, 32, 3)


def test_cancelled_requests_are_not_drawn(server: Server, drawn: list[int]) -> None:
    row = {"prompt": [["a circle"]], "steps": [[3]]}
    requests = [server.request(row) for _ in range(3)]
    requests[1].cancel_after = 0
    answers = server.infer(*requests)
    assert drawn == [2]
    error(answers[1], "CANCELLED")
    assert "png" in answers[0] and "png" in answers[2]
    requests = [server.request(row), server.request(row)]
    for request in requests:
        request.cancel_after = 2  # after it has begun
    for answer in server.infer(*requests):
        error(answer, "CANCELLED")


def test_a_failure_of_one_is_not_that_of_others(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.model.model
    images = model.images

    def fail(batch: list[Any], min_batch: int) -> Any:
        if any("bad" in asked.arguments.prompts[0] for asked in batch):
            raise RuntimeError("out of luck")
        return images(batch, min_batch)

    monkeypatch.setattr(model, "images", fail)
    rows = [{"prompt": [[p]], "steps": [[1]]} for p in ("a", "a bad one", "b")]
    answers = server.infer(*(server.request(row) for row in rows))
    assert error(answers[1], "INTERNAL") == "RuntimeError: out of luck"
    assert "png" in answers[0] and "png" in answers[2]


def test_a_model_whose_bundle_is_broken_does_not_load(tmp_path: Path) -> None:
    name = write_repository(DEFAULT, tmp_path, at="/nowhere/at/all")["model"]
    with pytest.raises(FileNotFoundError, match="/nowhere/at/all is no directory, expected a"):
        Server(tmp_path / name)


def test_an_instance_takes_the_gpu_that_the_server_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.cuda import device

    class Cuda:
        asked: list[int] = []

        def cudaSetDevice(self, number: int) -> tuple[int]:
            self.asked.append(number)
            return (101 if number > 1 else 0,)

    cuda = Cuda()
    monkeypatch.setattr(device, "bindings", lambda: cuda)
    triton.use_device(1)
    with pytest.raises(OSError, match="GPU 2 cannot be used .CUDA error 101."):
        triton.use_device(2)
    assert cuda.asked == [1, 2]


def test_finalize_lets_go(server: Server) -> None:
    other = type(server.model)()
    other.model = server.model.model
    other.finalize()
    assert other.model is None
