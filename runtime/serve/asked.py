"""What a client asks for: the JSON of `POST /v1/images/generations`, checked to the last field."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from runtime.arguments import Request, check_request, show, whole
from runtime.fields import refuse

MAX_BODY = 64 << 10  # bytes
# What else OpenAI's clients may send, with the values that change nothing here.
IDLE: dict[str, tuple[Any, ...]] = {
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "output_compression": (100,),
    "output_format": ("png",),
    "partial_images": (0,),
    "quality": ("auto", "standard"),
    "stream": (False,),
    "style": ("natural", "vivid"),
}
KNOBS = ("steps", "guidance", "top_k", "kappa")
FIELDS = ("prompt", "model", "n", "size", "response_format", "user", "seed", "deadline", *KNOBS)


class Refused(Exception):
    """A request that gets an error: HTTP status, one sentence, and OpenAI's names for it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The error object of OpenAI's API."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        row = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": row}


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    images: int = 10
    steps: int = 100
    pixels: int = 1 << 20  # of one image
    prompt: int = 4000  # characters
    deadline: float = 120.0  # seconds from the request's arrival to its answer


@dataclass(frozen=True)
class Asked:
    """A request that can be drawn. Requests of equal `key` may be drawn in one batch."""

    request: Request
    deadline: float
    key: tuple[Any, ...]


def read_asked(body: bytes, manifest: dict[str, Any], limits: Limits) -> Asked:
    """Parse and check; what is left out comes from the bundle, the seed at random.

    Raises Refused: 404 for another model, 400 for anything else.
    """
    fields = parse(body)
    for name, value in fields.items():
        if name in IDLE:
            known = [None, *IDLE[name]]
            if value not in known:
                wanted = " or ".join(json.dumps(item) for item in IDLE[name])
                raise wrong(name, f"{name} is {show(value)}, expected {wanted} or none.")
        elif name not in FIELDS:
            raise wrong(name, f"the field {show(name)} is not known; leave it out.")
    given = {name: value for name, value in fields.items() if value is not None}
    if given.get("model", manifest["name"]) != manifest["name"]:
        raise Refused(
            404,
            f"the model is {show(given['model'])}, expected {manifest['name']!r} or none.",
            param="model",
            code="model_not_found",
        )
    if given.get("response_format", "b64_json") != "b64_json":
        raise wrong(
            "response_format",
            f"response_format is {show(given['response_format'])}, expected 'b64_json':"
            f" this server keeps no images that a URL could name.",
        )
    prompt = given.get("prompt")
    if not isinstance(prompt, str) or not 0 < len(prompt) <= limits.prompt:
        found = f"{len(prompt)} characters long" if isinstance(prompt, str) else show(prompt)
        raise wrong(
            "prompt", f"the prompt is {found}, expected a text of 1 to {limits.prompt} characters."
        )
    size = given.get("size", "auto")
    height, width = read_size(size)
    # Before check_request, which makes a list as long as it is asked for.
    bounded("n", given.get("n", 1), limits.images)
    if "steps" in given:
        bounded("steps", given["steps"], limits.steps)
    try:
        request = check_request(
            manifest,
            prompt,
            seed=given.get("seed", secrets.randbelow(1 << 32)),
            n=given.get("n", 1),
            height=height,
            width=width,
            **{name: given[name] for name in KNOBS if name in given},
        )
    except ValueError as error:
        text = str(error)
        first = text.split()[0]
        param = {"height": "size", "width": "size"}.get(first, first)
        raise wrong(param if param in FIELDS else None, text) from None
    if request.height * request.width > limits.pixels:
        raise wrong(
            "size",
            f"the size is {request.width}x{request.height}, expected at most"
            f" {limits.pixels} pixels.",
        )
    return Asked(request, read_deadline(given.get("deadline"), limits), key_of(request))


def key_of(request: Request) -> tuple[Any, ...]:
    """What must be equal in requests that share a batch."""
    knobs = tuple(request.top_k), tuple(request.kappa)
    return (request.height, request.width, request.guidance, *knobs)


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object of whatever."""
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        text = " ".join(str(error).split())[:80]
        raise wrong(None, f"the body is no JSON ({text}), expected a JSON object.") from None
    if not isinstance(fields, dict):
        raise wrong(None, f"the body is {show(fields)}, expected a JSON object.")
    return fields


def read_size(size: Any) -> tuple[int | None, int | None]:
    """'WIDTHxHEIGHT' -> (height, width); 'auto' -> the bundle's own."""
    if size == "auto":
        return None, None
    parts = size.split("x") if isinstance(size, str) else []
    digits = [part.isascii() and part.isdigit() and len(part) < 7 for part in parts]
    if len(parts) != 2 or not all(digits):
        raise wrong("size", f"size is {show(size)}, expected WIDTHxHEIGHT such as '32x32'.")
    return int(parts[1]), int(parts[0])


def read_deadline(value: Any, limits: Limits) -> float:
    """Seconds that the client will wait, at most the server's."""
    if value is None:
        return limits.deadline
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= limits.deadline:
        raise wrong(
            "deadline",
            f"deadline is {show(value)}, expected seconds above 0, at most {limits.deadline:g}.",
        )
    return float(value)


def bounded(name: str, value: Any, most: int) -> int:
    """A whole number from 1 to what this server takes."""
    try:
        return whole(value, name, 1, most)
    except ValueError as error:
        raise wrong(name, str(error)) from None


def wrong(param: str | None, message: str) -> Refused:
    """A request that the client has to change."""
    return Refused(400, message, param=param)
