"""What a client asks for: the JSON of `POST /v1/images/generations`, checked to the last field."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.arguments import Request, check_request, show, whole, with_knobs
from runtime.budgettable import Unmeasured
from runtime.files.checked_json import refuse
from runtime.serve.batch import key_of

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
PICKED = ("steps", "top_k", "kappa")  # those of them that are left out, a budget picks
KNOBS = (*PICKED, "guidance", "sigmas")
FIELDS = (
    *("prompt", "negative_prompt", "model", "n", "size", "response_format", "user", "seed"),
    *("deadline", "budget", *KNOBS),
)
# A request, its budget in seconds, knobs that were given -> all that a budget picks.
Within = Callable[[Request, float, Mapping[str, Any]], dict[str, Any]]


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
    """A request that can be drawn. Requests of equal `key` may be drawn in one batch.

    `key` None: drawn alone, since its budget was measured so.
    """

    request: Request
    deadline: float
    key: tuple[Any, ...] | None


def read_asked(
    body: bytes, manifest: dict[str, Any], limits: Limits, within: Within | None = None
) -> Asked:
    """Parse and check; what is left out comes from the bundle, the seed at random.

    `within` picks knobs for a budget (a pipeline's). Raises Refused: 404
    for another model, 400 for anything else.
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
    texts(given, limits)
    size = given.get("size", "auto")
    height, width = read_size(size)
    # Before check_request, which makes a list as long as it is asked for.
    bounded("n", given.get("n", 1), limits.images)
    if "steps" in given:
        bounded("steps", given["steps"], limits.steps)
    fixed: dict[str, Any] = {
        "seed": given.get("seed", secrets.randbelow(1 << 32)),
        "n": given.get("n", 1),
        "negative": given.get("negative_prompt"),
        "height": height,
        "width": width,
    }
    knobs = {name: given[name] for name in KNOBS if name in given}
    budget = given.get("budget")
    try:
        request = check_request(manifest, given["prompt"], **fixed, **knobs)
        if budget is not None:
            if within is None:
                raise ValueError("budget is not known here, expected none; leave it out.")
            picked = within(request, budget, {name: knobs.get(name) for name in PICKED})
            request = with_knobs(manifest, request, **picked)
    except Unmeasured:  # whose sentence names paths of this machine
        raise wrong(
            "budget",
            "no budget was measured for such a request on this machine, expected it to be by"
            " whoever runs this server (d2m measure); leave budget out.",
        ) from None
    except ValueError as error:
        raise wrong(param_of(str(error)), str(error)) from None
    bounded("steps", len(request.top_k), limits.steps)  # of sigmas or a budget
    if request.height * request.width > limits.pixels:
        raise wrong(
            "size",
            f"the size is {request.width}x{request.height}, expected at most"
            f" {limits.pixels} pixels.",
        )
    deadline = read_deadline(given.get("deadline"), limits)
    return Asked(request, deadline, None if budget is not None else key_of(request))


def texts(given: Mapping[str, Any], limits: Limits) -> None:
    """Refuse prompts, for and against, that are no texts or longer than this server takes."""
    for name, least in (("prompt", 1), ("negative_prompt", 0)):
        text = given.get(name)
        if text is None and not least:
            continue
        if not isinstance(text, str) or not least <= len(text) <= limits.prompt:
            found = f"{len(text)} characters long" if isinstance(text, str) else show(text)
            what = f"a text of {least} to {limits.prompt} characters"
            raise wrong(name, f"the {name.replace('_', ' ')} is {found}, expected {what}.")


def param_of(sentence: str) -> str | None:
    """The field that an error of the runtime's is about, by the word that it begins with."""
    first = sentence.removeprefix("the ").partition(" ")[0].removesuffix("'s")
    field = {"height": "size", "width": "size", "negative": "negative_prompt"}.get(first, first)
    return field if field in FIELDS else None


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
