"""An image file that nobody vouches for -> pixels.

Its kind is read from its first bytes, never from its name or declared type, and its size from its
header: what would take too much memory or time is refused before a pixel is decoded.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import numpy as np

from runtime.serve.image_request import Refused

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS = ("PNG", "JPEG", "WEBP")  # no other parser of Pillow's sees a client's bytes
MAX_PIXELS = 1 << 25  # of a file: 134 MB while it is decoded
MAX_SIDE = 16_384
PNG_RATIO = 8 * 1032  # pixels of a byte at most: of one bit each, deflated by 1032 to 1
MAX_SCANS = 100  # of a progressive JPEG; each scan is work for every pixel, and usual are 10


def open_image(data: bytes, name: str) -> Image:
    """The image in `data`, decoded and upright. Refused, 400, names it by its field, `name`."""
    from PIL import Image, ImageOps

    check_size(webp_size(data), name)  # Pillow's WebP decoder takes its memory when it is opened
    # FF DA cannot stand in a scan's own data, where FF is followed by 00 or a restart marker.
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise refused(name, f"is a JPEG of more than {MAX_SCANS} scans; save it as baseline")
    try:
        image = Image.open(io.BytesIO(data), formats=KINDS)
        check_size(image.size, name)
        if image.format == "PNG" and image.width * image.height > PNG_RATIO * len(data):
            raise refused(name, "cannot be read (its header names more pixels than it can hold)")
        if image.mode[:1] in "IF":
            raise refused(name, f"has pixels of mode {image.mode}, expected 8 bits a channel")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except Refused:
        raise
    except Image.UnidentifiedImageError:
        raise refused(name, "is no PNG, JPEG or WebP file by its content") from None
    except Image.DecompressionBombError:
        raise refused(name, f"has too many pixels, expected at most {MAX_PIXELS}") from None
    except Exception as error:  # whatever a parser says of bytes that lie
        text = " ".join(str(error).split())[:80]
        raise refused(name, f"cannot be read ({text or type(error).__name__})") from None
    return image


def webp_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP file's canvas by its header; None where it is none."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", data[26:30]))
    return width, height


def check_size(size: tuple[int, int] | None, name: str) -> None:
    """Refused (400) where a header says more than is decoded."""
    if size is not None and (size[0] * size[1] > MAX_PIXELS or max(size) > MAX_SIDE):
        most = f"expected at most {MAX_PIXELS}, {MAX_SIDE} a side"
        raise refused(name, f"has {size[0]} x {size[1]} pixels, {most}")


def read_mask(image: Image, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """(mask [H, W], 255 where it is repainted, by which rule): "alpha" or "grey".

    OpenAI's rule: what is transparent (alpha 0) is repainted. A file without a transparent pixel
    is grey: white (128 or more) is repainted. Raises Refused (400).
    """
    if image.size != size:
        wide, high = image.size
        what = f"is {wide}x{high} and the image {size[0]}x{size[1]}, expected equal sizes"
        raise refused("mask", what)
    rule = "grey"
    mask = np.asarray(image.convert("L")) >= 128
    if image.has_transparency_data:
        clear = np.asarray(image.convert("RGBA"))[..., 3] == 0
        if clear.any():
            rule, mask = "alpha", clear
    if not mask.any():
        raise refused(
            "mask",
            "repaints nothing, expected transparent pixels (alpha 0), or white ones in an image"
            " without transparency",
        )
    return (mask * np.uint8(255)), rule


def refused(name: str, what: str) -> Refused:
    """400, about one file."""
    return Refused(400, f"{name} {what}.", param=name.partition(" ")[0])
