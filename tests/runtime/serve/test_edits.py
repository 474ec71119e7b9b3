"""Edits as OpenAI's client sends them, and files and forms that nobody should believe."""

import base64
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")
from PIL import Image, ImageFile

from runtime.image import settings_of, to_png
from runtime.images.given import digest
from runtime.request import check_request
from runtime.serve.batch import batch_call
from runtime.serve.edits.edit_request import parse_form, read_images
from runtime.serve.edits.image_file import MAX_SCANS, open_image, webp_size
from runtime.serve.edits.upload import EDITS, MAX_IMAGES, MAX_UPLOAD, Form, Held
from runtime.serve.image_request import EditImages, Limits, Refused, check_fields
from runtime.serve.jobs import Job
from runtime.serve.service import Service
from tests.stand_ins.http import running, until

Server = tuple[str, Service]
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (32, 32, 3), np.uint8)
HALF = np.zeros((32, 32), np.uint8)
HALF[:, 16:] = 255
KNOBS = {"steps": 4, "seed": 7, "top_k": 2}


def file(pixels: np.ndarray = PIXELS, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(alpha: np.ndarray) -> np.ndarray:
    """Black, as transparent as `alpha` says."""
    return np.dstack([np.zeros((*alpha.shape, 3), np.uint8), alpha])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=server[0] + "/v1", api_key="unused", max_retries=0)


def png_of(item: Any) -> bytes:
    return base64.b64decode(item.b64_json)


def alone(service: Service, png: bytes, **call: Any) -> bytes:
    """What the pipeline makes by itself in a batch of as many rows."""
    said = settings_of(Image.open(io.BytesIO(png)))
    pipeline = service.pipeline
    again = type(pipeline)(pipeline.bundle, "ort", threads=1, min_batch=said["batch"])
    return to_png(again("a red circle", steps=4, **{"seed": 7, **call}))


def test_openais_client_edits_an_image(server: Server, client: Any) -> None:
    service, picture = server[1], Image.fromarray(PIXELS)
    answer = client.images.edit(image=file(), prompt="a red circle", n=2, extra_body=KNOBS)
    for i, item in enumerate(answer.data):
        assert png_of(item) == alone(service, png_of(item), image=picture, seed=7 + i)
    said = settings_of(Image.open(io.BytesIO(png_of(answer.data[0]))))
    assert said["strength"] == 0.6 and len(said["image"]) == 64 and answer.size == "32x32"
    told = {name: answer.d2m[name] for name in ("strength", "steps_taken", "mask", "image_size")}
    assert told == {"strength": 0.6, "steps_taken": 3, "mask": None, "image_size": [32, 32]}
    assert answer.d2m["blocks_of"] == 3 * 18  # of the steps that were taken

    events = client.images.edit(
        image=("a.txt", file(kind="WEBP", lossless=True)),  # its name says nothing
        prompt="a red circle",
        n=2,
        stream=True,
        extra_body=KNOBS,
    )
    found = list(events)
    assert [event.type for event in found] == ["image_edit.completed"] * 2
    assert [event.b64_json for event in found] == [item.b64_json for item in answer.data]


def test_openais_client_repaints_what_a_mask_says(server: Server, client: Any) -> None:
    """Transparent is repainted, as OpenAI says; without transparency white is."""
    made = {}
    masks = {"alpha": with_alpha(255 - HALF), "grey": HALF}
    for rule, mask in masks.items():
        files = {"image": file(), "mask": file(mask)}
        answer = client.images.edit(**files, prompt="a red circle", extra_body=KNOBS)
        assert answer.d2m["mask"] == rule and answer.d2m["strength"] == 1.0
        made[rule] = png_of(answer.data[0])
    assert made["alpha"] == made["grey"]
    picture, mask = Image.fromarray(PIXELS), Image.fromarray(HALF)
    assert made["grey"] == alone(server[1], made["grey"], image=picture, mask=mask)
    said = settings_of(Image.open(io.BytesIO(made["grey"])))
    assert said["mask"] == digest((HALF[None] >= 128).astype(np.float32))


def test_an_images_own_size_is_kept_where_the_model_takes_it(client: Any) -> None:
    """A photo turned by its camera, larger than the server makes."""
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    photo = file(np.full((100, 200, 3), 90, np.uint8), "JPEG", exif=turned)
    answer = client.images.edit(image=photo, prompt="a", extra_body={"steps": 2})
    assert answer.size == "16x40" and answer.d2m["image_size"] == [100, 200]
    assert answer.d2m["notes"] == ["the image's size 100x200 became 16x40"]


def test_the_model_says_that_it_takes_images(
    server: Server, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    [model] = client.models.list()
    assert model.edits == 1
    manifest = server[1].pipeline.manifest
    components = {n: row for n, row in manifest["components"].items() if n != "vae_encoder"}
    monkeypatch.setitem(manifest, "components", components)
    with pytest.raises(openai.BadRequestError, match="takes no images: its bundle has no VAE enc"):
        client.images.edit(image=file(), prompt="a")
    with pytest.raises(openai.NotFoundError, match="the model is 'dall-e-2'"):
        monkeypatch.undo()
        client.images.edit(image=file(), prompt="a", model="dall-e-2")


def test_edits_share_a_batch_and_stay_what_they_are_alone(server: Server) -> None:
    service = server[1]

    def wanted(seed: int, mask: np.ndarray | None = None, **more: str) -> Any:
        files = {"image": [file(RANDOM.integers(0, 256, (32, 32, 3), np.uint8))]}
        if mask is not None:
            files["mask"] = [file(mask)]
        fields = {"prompt": "a", "steps": "3", "seed": str(seed), **more}
        return read_images(parse_form(fields, service.limits), Form(files=files), service)

    three = [wanted(1, HALF), wanted(2, HALF[:, ::-1]), wanted(3, HALF.T)]
    assert len({request.key for request in three}) == 1
    others = [wanted(1), wanted(1, strength="0.5"), wanted(1, HALF, strength="0.5")]
    assert len({request.key for request in [*three, *others]}) == 4
    rows = service.min_batches.of(three[0].arguments)
    assert rows is not None
    together, *_ = service.threads.images([Job(request) for request in three], rows)
    apart = [service.threads.images([Job(request)], rows)[0][0] for request in three]
    assert together == apart


def test_a_model_that_sees_references_sees_all_images(server: Server) -> None:
    """FLUX.1 Kontext's one; which is denoised too where a mask says what of it is kept."""
    manifest = json.loads(json.dumps(server[1].pipeline.manifest))
    manifest["latents"]["condition"] = "reference"
    picture = Image.fromarray(PIXELS)

    def wanted(images: EditImages, **fields: Any) -> Any:
        return check_fields({"prompt": "a", **fields}, manifest, Limits(), images=images)

    plain = wanted(EditImages((picture,)), n=2)
    given = plain.arguments.images
    assert given.image is None and len(given.references.pixels) == 1 and given.strength == 1.0
    assert plain.edit["strength"] is None and plain.nbytes == given.references.pixels[0].nbytes
    assert plain.key is None  # what batches do to its bits was not tried
    again = check_request(manifest, **batch_call([plain.arguments, plain.arguments]))
    assert len(again.prompts) == 4  # what a batch gives again is the same to the last bit
    assert np.array_equal(again.images.references.pixels[0], given.references.pixels[0])
    masked = wanted(EditImages((picture,), HALF, "grey")).arguments.images
    assert masked.image is not None and masked.mask is not None and masked.references.pixels
    assert wanted(EditImages((picture,)), strength=0.5).arguments.images.strength == 0.5


def test_a_forms_texts_become_their_fields_types() -> None:
    fields = {"prompt": "12", "n": "2", "stream": "true", "top_k": ["1", "2"], "user": "3"}
    fields |= {"lora": {"style": "0.5"}, "sigmas": "[1, 0.5]", "size": "32x32"}
    assert parse_form(fields, Limits()) == {
        **{"prompt": "12", "n": 2, "stream": True, "top_k": [1, 2], "user": "3"},
        **{"lora": {"style": 0.5}, "sigmas": [1.0, 0.5], "size": "32x32"},
    }
    for name, text, sentence in (
        ("n", "x", "n is 'x', expected a whole number from 1 to 10"),
        ("strength", "true", "strength is True, expected a number above 0, at most 1"),
        ("strength", "1e999", "strength is inf, expected a number"),
        ("negative", "x", "the field 'negative' is not known"),
    ):
        with pytest.raises(Refused, match=sentence):
            parse_form({"prompt": "a", name: text}, Limits())


# ------------------------------------------------------------------------------- files that lie


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, more: bytes = b"") -> bytes:
    """A PNG whose header says anything."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def webp(kind: bytes, header: bytes) -> bytes:
    return b"RIFF\xff\0\0\0WEBP" + kind + b"\x0a\0\0\0" + header.ljust(32, b"\0")


BOMBS = {
    "a PNG of 3 GB": (png(30_000, 30_000, zlib.compress(b"")), "too many pixels|has 30000 x"),
    "the largest PNG": (png(2**31 - 1, 2**31 - 1, b""), "too many pixels"),
    "a long PNG": (png(1, 20_000, zlib.compress(bytes(80_000))), "has 1 x 20000 pixels"),
    "more pixels than bytes hold": (png(5000, 5000, b"x" * 90), "names more pixels than it can"),
    "a WebP canvas": (webp(b"VP8X", b"\0\0\0\0" + b"\xff\x3f\0" * 2), "has 16384 x 16384 pixels"),
    "a lossless WebP": (webp(b"VP8L", b"\x2f\xff\xff\xff\xff"), "has 16384 x 16384 pixels"),
    "a lossy WebP": (webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f"), "has 16383 x 16383"),
    "a JPEG of many scans": (
        file(kind="JPEG") + b"\xff\xda" * (MAX_SCANS + 1),
        "is a JPEG of more than 100 scans",
    ),
    "no image": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no PNG, JPEG or WebP file by"),
    "a GIF": (file(kind="GIF"), "is no PNG, JPEG or WebP file by its content"),
    "a TIFF": (file(kind="TIFF"), "is no PNG, JPEG or WebP file by its content"),
    "16 bits": (file(PIXELS[..., 0].astype(np.uint16)), "has pixels of mode I;16, expected 8"),
    "nothing": (b"", "is no PNG, JPEG or WebP file"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_and_lies_are_refused_before_a_pixel_is_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, sentence = BOMBS[name]

    def load(*arguments: Any) -> Any:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", load)
    monkeypatch.setattr("PIL._webp.WebPAnimDecoder", load)
    with pytest.raises(Refused, match=sentence) as caught:
        open_image(data, "image")
    assert (caught.value.status, caught.value.param) == (400, "image")
    assert caught.value.message.startswith("image ") and len(caught.value.message) < 200


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_is_cut_off_is_refused(kind: str) -> None:
    data = file(kind=kind)
    assert webp_size(data) == ((32, 32) if kind == "WEBP" else None)
    for size in (len(data) // 2, len(data) - 60):
        with pytest.raises(Refused, match="image (cannot be read|is no PNG)"):
            open_image(data[:size], "image")
    inflated = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))
    with pytest.raises(Refused, match="cannot be read"):
        open_image(png(4, 4, zlib.compress(bytes(52)), inflated), "image")


def test_masks_that_say_nothing_are_refused(server: Server) -> None:
    def wanted(mask: np.ndarray) -> Any:
        files = {"image": [file()], "mask": [file(mask)]}
        return read_images({"prompt": "a"}, Form(files=files), server[1])

    for mask, sentence in (
        (HALF[:, :16], "mask is 16x32 and the image 32x32, expected equal sizes"),
        (np.zeros_like(HALF), "mask repaints nothing, expected transparent pixels"),
        (with_alpha(np.full_like(HALF, 255)), "mask repaints nothing"),
    ):
        with pytest.raises(Refused, match=sentence) as caught:
            wanted(mask)
        assert caught.value.param == "mask"


# ------------------------------------------------------------------------------- forms that lie

HEAD = b"content-type: multipart/form-data; boundary=x"


def form(*parts: tuple[str, bytes], end: bytes = b"--x--\r\n") -> bytes:
    lines = (b'--x\r\ncontent-disposition: form-data; name="%s"\r\n\r\n' % n.encode() + v
             for n, v in parts)  # fmt: skip
    return b"\r\n".join([*lines, end])


def post(url: str, content: Any, **headers: str) -> Any:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    return httpx.post(url + EDITS, content=content, headers=kind | headers, timeout=60)


def test_what_is_no_form(server: Server) -> None:
    url, service = server
    cut = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n\x89PNG'
    too_many = [("image", b"")] * 2100
    answers = [
        (400, "no form that can be read", post(url, b"no form")),
        (400, "ends within a part", post(url, cut)),
        (400, "ends within a part", post(url, form(("prompt", b"a"), end=b""))),
        (400, "name", post(url, b"--x\r\n\r\na\r\n--x--")),
        (400, "too many fields", post(url, form(*too_many))),
        (400, "exceeded maximum size", post(url, form(("prompt", b"a" * 70_000)))),
        (400, "'prompt' is sent twice", post(url, form(("prompt", b"a"), ("prompt", b"b")))),
        (400, "image is left out", post(url, form(("prompt", b"a")))),
        (400, "image is a text, expected a", post(url, form(("prompt", b"a"), ("image", b"x")))),
        (413, "the body is too large", post(url, iter([cut, *[bytes(1 << 20)] * 33]))),
        (415, "expected multipart/form-data", httpx.post(url + EDITS, json={"prompt": "a"})),
        (403, "no form is taken here", post(url, b"", origin="https://evil.example")),
        (403, "no form is taken here", post(url, b"", origin="null")),
    ]
    for status, sentence, answer in answers:
        error = answer.json()["error"]
        assert answer.status_code == status and sentence in error["message"], error
        assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    files = [("image[]", (f"{i}", file())) for i in range(MAX_IMAGES + 2)]
    many = httpx.post(url + EDITS, data={"prompt": "a"}, files=files)
    assert many.status_code == 400 and "too many files" in many.json()["error"]["message"]
    several = httpx.post(url + EDITS, data={"prompt": "a"}, files=files[:2])
    assert "there are 2 images, expected at most 1" in several.json()["error"]["message"]
    other = httpx.post(url + EDITS, data={"prompt": "a"}, files={"markup": file()})
    assert "the file 'markup' is not known" in other.json()["error"]["message"]
    same = httpx.post(url + EDITS, data={"prompt": ""}, files={"mask": file()},
                      headers={"origin": url})  # fmt: skip
    assert same.status_code == 400 and same.json()["error"]["param"] == "prompt"
    assert service.held.bytes == 0


def test_memory_of_all_edits_together_has_a_limit(server: Server) -> None:
    url, service = server
    service.held.most = 3000
    try:
        answer = httpx.post(url + EDITS, data={"prompt": "a"}, files={"image": file()})
    finally:
        service.held.most = Held().most
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error" and service.held.bytes == 0


def test_deadlines_and_clients_that_leave(server: Server, client: Any) -> None:
    url, service = server
    knobs = {"steps": 100, "deadline": 0.2, "strength": 1}
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.edit(image=file(), prompt="a", extra_body=knobs)
    assert caught.value.status_code == 504 and caught.value.code == "deadline_exceeded"
    gone = service.metrics.cancelled.labels("disconnect")._value
    host, port = url.removeprefix("http://").split(":")
    fields = [("prompt", b"a"), ("steps", b"100"), ("strength", b"1")]
    body = form(*fields, end=b"").removesuffix(b"\r\n") + (
        b'\r\n--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
        + file() + b"\r\n--x--\r\n"
    )  # fmt: skip
    head = b"POST %s HTTP/1.1\r\nhost: localhost\r\n%s\r\ncontent-length: %d\r\n\r\n"
    left = gone.get()
    for part, begun in (
        (body[: len(body) // 2], lambda: service.held.bytes > 0),
        (body, lambda: service.threads.active),
    ):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head % (EDITS.encode(), HEAD, len(body)) + part)
            until(begun)
        until(lambda: not service.threads.active and service.held.bytes == 0)
    until(lambda: gone.get() == left + 2)


def test_an_absurd_size_is_refused_when_it_is_announced(server: Server) -> None:
    host, port = server[0].removeprefix("http://").split(":")
    head = b"POST %s HTTP/1.1\r\nhost: localhost\r\n%s\r\n" % (EDITS.encode(), HEAD)
    for rest in (
        b"transfer-encoding: chunked\r\n\r\nFFFFFFFF\r\nab",
        b"content-length: %d\r\n\r\nab" % (MAX_UPLOAD + 1),
    ):
        began = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head + rest)
            assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
        assert time.monotonic() - began < 5


def test_the_schema_tells_the_fields_of_a_form(server: Server) -> None:
    schema = httpx.get(server[0] + "/openapi.json").json()
    body = schema["paths"][EDITS]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert body["properties"]["image"] and body["properties"]["strength"]
    assert set(body["required"]) == {"prompt", "image"} and json.dumps(body)
