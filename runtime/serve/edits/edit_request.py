"""The form of `POST /v1/images/edits`, checked to the last field and file."""

from __future__ import annotations

import asyncio
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, Field
from pydantic_core import from_json
from starlette.requests import Request

from runtime.serve.edits.image_file import open_image, read_mask
from runtime.serve.edits.upload import Form
from runtime.serve.image_request import (
    EditImages,
    ImageRequest,
    Limits,
    Refused,
    fields_of,
    image_count,
    typed,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.serve.service import Service

FILES = ("image", "mask")


@cache
def edit_fields_of(limits: Limits) -> type[BaseModel]:
    """The fields of a form besides its files: those of generations, and what images need."""
    base: Any = fields_of(limits)

    class EditFields(base):  # type: ignore[misc]
        strength: float | None = Field(None, description="a number above 0, at most 1")
        input_fidelity: Literal["high", "low"] | None = None

    return EditFields


def form_schema(limits: Limits) -> dict[str, Any]:
    """The JSON schema of a form with its files, for /openapi.json."""
    schema: dict[str, Any] = edit_fields_of(limits).model_json_schema()
    for name in FILES:
        schema["properties"][name] = {"type": "string", "format": "binary"}
    return {**schema, "required": [*schema["required"], "image"]}


async def read_edit(form: Form, service: Service) -> ImageRequest:
    """A form as a request; its files are decoded one at a time, by another thread.

    Raises Refused: 404 for another model, 400 for anything else.
    """
    given = parse_form(form.fields, service.limits)
    for name in form.files:
        if name not in FILES:
            message = f"the file {name[:60]!r} is not known; leave it out."
            raise Refused(400, message, param=name[:60])
    if not image_count(service.pipeline.manifest):
        raise Refused(
            400,
            "this model takes no images: its bundle has no VAE encoder, which whoever runs this"
            " server can add.",
            param="image",
        )
    async with service.decoding:
        return await asyncio.to_thread(read_images, given, form, service)


def read_images(given: dict[str, Any], form: Form, service: Service) -> ImageRequest:
    """The files decoded, and all of it checked."""
    files, masks = form.files.pop("image", []), form.files.pop("mask", [])
    if not files:
        raise Refused(400, "image is left out, expected a PNG, JPEG or WebP file.", param="image")
    if len(masks) > 1:
        raise Refused(400, f"there are {len(masks)} masks, expected one.", param="mask")
    most = image_count(service.pipeline.manifest)
    if len(files) > most:
        message = f"there are {len(files)} images, expected at most {most}, which this model sees."
        raise Refused(400, message, param="image")
    images = tuple(open_image(data, "image") for data in files)
    mask, rule = None, None
    if masks:
        mask, rule = read_mask(open_image(masks[0], "mask"), images[0].size)
    return service.check(given, EditImages(images, mask, rule))


def parse_form(fields: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """A form's texts with the types of their fields; raises Refused 400."""
    for name in FILES:
        if name in fields:
            message = f"{name} is a text, expected a file (with curl: -F {name}=@FILE)."
            raise Refused(400, message, param=name)
    model = edit_fields_of(limits)
    known = model.model_fields
    values = {
        name: value if name not in known or takes_text(known[name].annotation) else as_json(value)
        for name, value in fields.items()
    }
    return typed(values, model, model.model_validate)


def takes_text(annotation: Any) -> bool:
    """Whether a field may be a text: then it is not read as a number, a list or an object."""
    if get_origin(annotation) in (Union, UnionType, Literal):
        return any(map(takes_text, get_args(annotation)))
    return annotation in (str, Any) or isinstance(annotation, str)


def as_json(value: Any) -> Any:
    """What a text says as JSON ("4", "true", "[1, 2]"), in lists and objects too; else itself."""
    if isinstance(value, list):
        return [as_json(each) for each in value]
    if isinstance(value, dict):
        return {name: as_json(each) for name, each in value.items()}
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError:
        return value


def refuse_other_site(request: Request, origins: Sequence[str]) -> None:
    """403 where a page of another site sends a form, unless `origins` names that site.

    Browsers send forms to any site without asking it first, JSON only after it agreed.
    """
    origin = request.headers.get("origin")
    if origin is None or origin in origins or "*" in origins:
        return
    if urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower():
        raise Refused(403, f"the page is of {origin[:60]!r}, from which no form is taken here.")
