"""The JSON of `POST /v1/images/generations`, checked to the last field."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from starlette.responses import JSONResponse

from runtime.families import family_of
from runtime.files.checked_json import show
from runtime.images.given import CONTROL
from runtime.latency_budget import NotMeasured
from runtime.lora.folder import read_loras
from runtime.request import Request, check_request, whole_number, with_knobs
from runtime.serve.batch import batch_key

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BODY = 64 << 10  # bytes
TOO_LARGE = "d2m.too_large"  # in a request's scope: a chunk was announced that is over the limit
# Sizes that OpenAI's clients send without knowing what the model makes.
SIZES = "256x256 512x512 1024x1024 1024x1536 1536x1024 1024x1792 1792x1024".split()
# Taken, since OpenAI's clients send them.
IGNORED = "quality style moderation input_fidelity complexity".split()
PICKED = ("steps", "top_k", "kappa")  # a budget picks those that are left out
KNOBS = (*PICKED, "guidance", "sigmas", "cache")
Quality = Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"]
# A request, its budget in seconds, knobs that were given -> all that a budget picks.
PickKnobs = Callable[[Request, float, Mapping[str, Any]], dict[str, Any]]


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

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The error object of OpenAI's API."""
        wait = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return JSONResponse({"error": self.row()}, self.status, {**(headers or {}), **wait})

    def row(self) -> dict[str, Any]:
        """What the error object holds."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    images: int = 10
    steps: int = 100
    pixels: int = 1 << 20  # of one image
    prompt: int = 4000  # characters
    deadline: float = 120.0  # seconds from the request's arrival to its answer


@dataclass(frozen=True)
class EditImages:
    """What a client wants changed: images, decoded, and what of the first."""

    images: tuple[Image, ...]
    mask: np.ndarray | None = None  # [H, W], 255 where it is repainted
    rule: str | None = None  # by which the mask was read: "alpha" or "grey"


@dataclass(frozen=True)
class ImageRequest:
    """A request that can be generated. Requests of equal `key` may share a batch.

    `key` None: generated alone, since its budget was measured so, or with cached steps, where
    which blocks run depends on every bit, or with LoRAs, which change the weights, or with
    references, whose tokens batches were not tried with. `notes`: what is not done as requested, a
    clause each.
    """

    arguments: Request
    deadline: float
    key: tuple[Any, ...] | None
    format: str = "png"
    compression: int = 100  # OpenAI's word for the quality of jpeg and webp
    notes: tuple[str, ...] = ()
    stream: bool = False
    loras: tuple[tuple[Path, float], ...] = ()  # files and strengths
    edit: Mapping[str, Any] = field(default_factory=dict)  # of an edit: what its answer says

    @property
    def nbytes(self) -> int:
        """Of its images, of which one that is for several counts once."""
        given = self.arguments.images
        rows = (given.image, given.mask, given.control, *given.references.pixels)
        return sum(r.nbytes if all(r.strides) else r[0].nbytes for r in rows if r is not None)


@cache
def fields_of(limits: Limits) -> type[BaseModel]:
    """The fields of a body. What is expected of a wrong value: its description, or pydantic's word.

    Ranges that depend on the bundle are check_request's.
    """

    def optional(expected: str, **bounds: Any) -> Any:
        return Field(None, description=expected, **bounds)

    def count(most: int) -> Any:
        return optional(f"a whole number from 1 to {most}", ge=1, le=most)

    most = limits.prompt
    text = f"a text of {{}} to {most} characters"
    per_step = "a whole number, or a list with one for every step"
    seconds = f"seconds from 0.001, at most {limits.deadline:g}"

    class Fields(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

        prompt: str = Field(min_length=1, max_length=most, description=text.format(1))
        negative_prompt: str | None = optional(text.format(0), max_length=most)
        model: str | None = optional("a name that /v1/models lists")
        n: int | None = count(limits.images)
        size: str | None = optional(
            "WIDTHxHEIGHT such as '32x32'", pattern="^(auto|[0-9]{1,6}x[0-9]{1,6})$"
        )
        seed: int | None = optional("a whole number from 0")
        steps: int | None = count(limits.steps)
        guidance: float | None = optional("a number from 0 to 1000")
        top_k: int | list[int] | None = optional(per_step)
        kappa: int | list[int] | None = optional(per_step)
        sigmas: list[float] | None = optional("a list of decreasing numbers")
        cache: str | None = optional("a text such as 'first-block:0.1'", max_length=64)
        lora: dict[str, float] | None = optional(
            "an object of names that /v1/models lists and strengths, such as {'style': 0.8}"
        )
        budget: float | None = optional("the seconds that generating may take")
        deadline: float | None = optional(seconds, ge=0.001, le=limits.deadline)
        output_format: Literal["png", "jpeg", "webp"] | None = None
        output_compression: int | None = optional("a whole number from 0 to 100", ge=0, le=100)
        response_format: Literal["b64_json"] | None = optional(
            "'b64_json': this server keeps no images that a URL could name"
        )
        background: Literal["auto", "opaque"] | None = None
        moderation: Literal["auto", "low"] | None = None
        partial_images: Literal[0] | None = None
        complexity: Literal["low", "medium", "high"] | None = None
        quality: Quality | None = None
        safety_identifier: Any = None
        stream: bool | None = None
        style: Literal["natural", "vivid"] | None = None
        user: Any = None

    return Fields


def read_request(
    body: bytes,
    manifest: dict[str, Any],
    limits: Limits,
    pick_knobs: PickKnobs | None = None,
    aliases: Sequence[str] = (),
    loras: Path | None = None,
) -> ImageRequest:
    """Parse a JSON body and check it; see `check_fields`."""
    return check_fields(parse(body, limits), manifest, limits, pick_knobs, aliases, loras)


def check_fields(
    given: Mapping[str, Any],
    manifest: dict[str, Any],
    limits: Limits,
    pick_knobs: PickKnobs | None = None,
    aliases: Sequence[str] = (),
    loras: Path | None = None,
    images: EditImages | None = None,
) -> ImageRequest:
    """Check fields of the right types; those left out come from the bundle, the seed at random.

    `images`: of an edit, whose size is that of its image unless another is given; `pick_knobs`
    picks knobs for a budget (a pipeline's); `aliases`: names of the model besides the bundle's;
    `loras`: the folder of those that may be named. Raises Refused: 404 for another model, 400 for
    anything else.
    """
    names = [manifest["name"], *aliases]
    if given.get("model", names[0]) not in names:
        known = ", ".join(map(repr, names))
        message = f"the model is {show(given['model'])}, expected {known} or none."
        raise Refused(404, message, param="model", code="model_not_found")
    height, width, notes = read_size(given.get("size", "auto"), manifest, limits, images)
    for name in IGNORED:
        if given.get(name, "auto") != "auto":
            notes.append(f"{name} {given[name]} has no effect")
    call: dict[str, Any] = {"seed": secrets.randbelow(1 << 32), "height": height, "width": width}
    call["negative"] = given.get("negative_prompt")
    call |= {name: given[name] for name in ("seed", "n", *KNOBS) if name in given}
    if images is not None:
        call |= image_arguments(manifest, images, given.get("strength"))
    budget = given.get("budget")
    try:
        chosen = read_loras(given.get("lora", {}), loras)
        request = check_request(manifest, given["prompt"], **call)
        if budget is not None:
            if pick_knobs is None:
                raise ValueError("budget is not known here, expected none; leave it out.")
            picked = pick_knobs(request, budget, {name: call.get(name) for name in PICKED})
            request = with_knobs(manifest, request, **picked)
        whole_number(len(request.top_k), "steps", 1, limits.steps)  # of sigmas or a budget
    except NotMeasured:  # whose sentence names paths of this machine
        raise bad_request(
            "budget",
            "no budget was measured for such a request on this machine, expected a table that"
            " whoever runs this server makes (d2m measure); leave budget out.",
        ) from None
    except ValueError as error:
        raise bad_request(param_of(str(error), limits), str(error)) from None
    made = f"{request.width}x{request.height}"
    if request.height * request.width > limits.pixels:  # the bundle's own, or a reference's
        message = f"the size is {made}, expected at most {limits.pixels} pixels."
        raise bad_request("size", message)
    if images is not None and given.get("size", "auto") == "auto":
        had = "x".join(map(str, images.images[0].size))
        notes += [] if had == made else [f"the image's size {had} became {made}"]
    alone = budget is not None or request.cache.skips or chosen or request.images.references.pixels
    return ImageRequest(
        request,
        float(given.get("deadline", limits.deadline)),
        None if alone else batch_key(request),
        given.get("output_format", "png"),
        given.get("output_compression", 100),
        tuple(notes),
        bool(given.get("stream", False)),
        chosen,
        said_of(request, images),
    )


def image_arguments(
    manifest: dict[str, Any], images: EditImages, strength: float | None
) -> dict[str, Any]:
    """The images of an edit as the arguments of a pipeline's call, by what the model reads.

    A model that sees references sees all of them, and begins with the first where a mask or a
    strength says how much of it is kept.
    """
    first = images.images[0]
    call: dict[str, Any] = {"mask": images.mask, "strength": strength}
    if manifest["latents"].get("condition") == CONTROL:
        return call | {"control": first}
    if family_of(manifest).references(manifest):
        call["references"] = list(images.images)
        if images.mask is None and strength is None:
            return call
    return call | {"image": first}


def image_count(manifest: dict[str, Any]) -> int:
    """How many images an edit may have; 0 where the bundle has no VAE encoder."""
    if "vae_encoder" not in manifest["components"]:
        return 0
    return max(1, family_of(manifest).references(manifest))


def said_of(request: Request, images: EditImages | None) -> dict[str, Any]:
    """What the answer of an edit says of it; nothing of what is none."""
    if images is None:
        return {}
    steps = len(request.top_k)
    taken = steps - request.images.first_step(steps)
    strength = None if request.images.image is None else request.images.strength
    found = {"strength": strength, "steps_taken": taken, "mask": images.rule}
    return found | {"image_size": list(images.images[0].size)}


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """The fields of a JSON body that were given, with their types; raises Refused 400."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        text = " ".join(str(error).split())[:80]
        raise bad_request(None, f"the body is no JSON ({text}), expected a JSON object.") from None
    if not isinstance(fields, dict):
        raise bad_request(None, f"the body is {show(fields)}, expected a JSON object.")
    model = fields_of(limits)
    return typed(fields, model, model.model_validate)


def typed(
    fields: dict[str, Any], model: type[BaseModel], validate: Callable[[Any], BaseModel]
) -> dict[str, Any]:
    """The fields that were given, as `validate` of `model` reads them; raises Refused 400."""
    try:
        return validate(fields).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        raise bad_request(name, f"the field {show(name)} is not known; leave it out.")
    value: Any = fields.get(name)
    wrong_length = first["type"].startswith("string_too")
    actual = f"{len(value)} characters long" if wrong_length else show(value)
    default = first["msg"].removeprefix("Input should be ")
    expected = model.model_fields[name].description or default
    raise bad_request(name, f"{name} is {actual}, expected {expected}.")


def read_size(
    size: str, manifest: dict[str, Any], limits: Limits, images: EditImages | None = None
) -> tuple[int | None, int | None, list[str]]:
    """'WIDTHxHEIGHT' -> height, width, notes; 'auto' -> None: the image's size or the bundle's.

    Of a size that OpenAI's clients send, or an image has, and that is larger than this server
    makes, the shape is kept: the sides nearest below, of about as many pixels as the bundle's own
    size. Raises Refused, 400, for more pixels than are allowed.
    """
    if size == "auto":
        if images is None:
            return None, None, []
        width, height = images.images[0].size
        if width * height <= limits.pixels:
            return None, None, []
        what = ""  # said of every image that does not keep its size
    else:
        width, height = map(int, size.split("x"))
        if width * height <= limits.pixels:
            return height, width, []
        if size not in SIZES:
            most = f"expected at most {limits.pixels} pixels."
            raise bad_request("size", f"the size is {width}x{height}, {most}")
        what = f"size {size}"
    factor = manifest["latents"]["vae_scale_factor"] * manifest["latents"]["patch"]
    own = manifest["defaults"]["height"] * manifest["defaults"]["width"]
    scale = math.sqrt(own / (width * height)) / factor
    width, height = (max(1, int(side * scale)) * factor for side in (width, height))
    return height, width, [f"{what} became {width}x{height}"] if what else []


def param_of(sentence: str, limits: Limits) -> str | None:
    """The field that an error of the runtime's is about, by the word that it begins with."""
    first = sentence.removeprefix("the ").partition(" ")[0].removesuffix("'s")
    field = {"height": "size", "width": "size", "negative": "negative_prompt"}.get(first, first)
    known = {*fields_of(limits).model_fields, "image", "mask", "strength"}
    return field if field in known else None


def bad_request(param: str | None, message: str) -> Refused:
    """A request that the client has to change."""
    return Refused(400, message, param=param)
