"""A multipart body: its fields as text and its files as bytes, within limits that hold while it is
read. Nothing is written to disk."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from runtime.serve.image_request import MAX_BODY, TOO_LARGE, Refused

EDITS = "/v1/images/edits"
MAX_UPLOAD = 32 << 20  # bytes of one body
MAX_HELD = 256 << 20  # bytes of all bodies and of the images read from them, together
UPLOAD_SECONDS = 60.0  # within which a body must have arrived: 4.5 Mbit/s for the largest
MAX_IMAGES = 16  # files named image, as OpenAI's API takes
MAX_FIELDS = 2000  # a list of sigmas is a field a step
NESTED = re.compile(r"([a-z_]{1,64})\[([^\[\]]{0,200})\]")


@dataclass
class Form:
    """Fields are texts, or lists (`top_k[]`) and objects (`lora[style]`) of texts."""

    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)


class Held:
    """Bytes that edits keep in memory, of all requests together: bodies, then images."""

    def __init__(self, most: int = MAX_HELD) -> None:
        self.most, self.bytes = most, 0

    @contextmanager
    def take(self, retry_after: Callable[[], int]) -> Iterator[Callable[[int], None]]:
        """`with held.take(...) as keep`: keep(count) counts until the end of the block.

        keep raises Refused, 429, where all together would be too many.
        """
        mine = 0

        def keep(count: int) -> None:
            nonlocal mine
            if self.bytes + count > self.most:
                raise Refused(
                    429,
                    f"the images of other requests take {self.bytes} of {self.most} bytes;"
                    " try again later.",
                    code="rate_limit_exceeded",
                    retry_after=retry_after(),
                )
            self.bytes += count
            mine += count

        try:
            yield keep
        finally:
            self.bytes -= mine


class Parser(MultiPartParser):
    """starlette's (on python-multipart), in memory alone, and it knows whether the form ended."""

    spool_max_size = 2 * MAX_UPLOAD  # never reached: no client's image is left in a folder
    ended = False

    def on_end(self) -> None:
        """The closing boundary; python-multipart does not ask for it."""
        self.ended = True


async def read_form(request: Request, keep: Callable[[int], None]) -> Form:
    """The form of a request; `keep` counts its bytes (Held).

    Raises Refused: 413 where it is too large, 408 too slow, 429 where memory is full, 415 no form,
    400 a broken one; starlette's ClientDisconnect.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Refused(415, f"the body is {kind[:60]!r}, expected multipart/form-data.")
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > MAX_UPLOAD:
        raise too_large()
    parser = Parser(
        request.headers,
        counted(request, keep),  # type: ignore[arg-type]
        max_files=MAX_IMAGES + 1,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_BODY,
    )
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            parsed = await parser.parse()
    except TimeoutError:
        message = f"the body was not complete within {UPLOAD_SECONDS:g} seconds."
        raise Refused(408, message) from None
    except MultiPartException as error:
        reason = error.message.rstrip(".").lower()[:120]
        raise Refused(400, f"the body is no form that can be read ({reason}).") from None
    if not parser.ended:
        raise Refused(400, "the body ends within a part, expected its closing boundary.")
    form = Form()
    for name, value in parsed.multi_items():
        if isinstance(value, str):
            add_field(form.fields, name, value)
        else:
            form.files.setdefault(name.removesuffix("[]"), []).append(await value.read())
            await value.close()
    return form


async def counted(request: Request, keep: Callable[[int], None]) -> AsyncIterator[bytes]:
    """The body's pieces, each counted before it is kept."""
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_UPLOAD or TOO_LARGE in request.scope:
            raise too_large()
        keep(len(piece))
        yield piece


def too_large() -> Refused:
    """For a body over the limit, declared or sent."""
    return Refused(413, f"the body is too large, expected at most {MAX_UPLOAD} bytes.")


def add_field(fields: dict[str, Any], name: str, text: str) -> None:
    """`a` is a text, `a[]` and `a[0]` lists, `a[key]` an object; Refused for a field sent twice."""
    nested = NESTED.fullmatch(name)
    if nested is None:
        twice = name in fields
        fields[name] = text
    elif not nested[2] or nested[2].isdecimal():
        values = fields.setdefault(nested[1], [])
        twice = not isinstance(values, list)
        if not twice:
            values.append(text)
    else:
        values = fields.setdefault(nested[1], {})
        twice = not isinstance(values, dict) or nested[2] in values
        if not twice:
            values[nested[2]] = text
    if twice:
        raise Refused(
            400, f"the field {name[:60]!r} is sent twice, expected once.", param=name[:60]
        )
