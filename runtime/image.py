"""From the VAE's floats to a PIL image, and to a PNG that knows how it was made."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.files.atomic import write_bytes
from runtime.files.checked_json import parse_json

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "d2m"  # of the text chunk: a JSON object
EXIF, COMMENT = 0x8769, 0x9286  # a JPEG's or WebP's UserComment holds that object
KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
MAX_SCALE = 64  # squares of that many pixels in place of one
QUALITY = 95  # of JPEG and WebP files, 0 to 100
UTF16 = b"UNICODE\0"  # how EXIF marks a comment's encoding


def to_array(pixels: np.ndarray) -> np.ndarray:
    """[3, H, W] in [-1, 1] -> [H, W, 3], float32 in [0, 1]; ValueError where not finite."""
    if not np.isfinite(pixels).all():
        raise ValueError(
            "the image holds values that are not finite (NaN or infinity), expected numbers;"
            " the bundle's weights or this backend's arithmetic overflow: try --dtype fp32."
        )
    return np.clip(pixels.astype(np.float32).transpose(1, 2, 0) * 0.5 + 0.5, 0, 1)


def to_image(pixels: np.ndarray, settings: dict[str, Any] | None = None) -> Image:
    """[3, H, W] in [-1, 1] -> an RGB image, rounded as diffusers' VaeImageProcessor rounds.

    `settings` (prompt, seed, steps, ...) travel in `image.info` and `save` writes them.
    """
    from PIL import Image

    # numpy's round is to even, as torch's and so diffusers' is.
    image = Image.fromarray((to_array(pixels) * 255).round().astype(np.uint8), "RGB")
    if settings is not None:
        image.info[KEY] = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return image


def to_png(image: Image) -> bytes:
    """The image as a PNG file with its settings; the same image gives the same bytes."""
    from PIL import PngImagePlugin

    texts = PngImagePlugin.PngInfo()
    if KEY in image.info:
        texts.add_itxt(KEY, image.info[KEY])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=texts)
    return buffer.getvalue()


def to_file(image: Image, kind: str = "png", quality: int = 100) -> bytes:
    """The image as a png, jpeg or webp file with its settings; `quality` 0 to 100, not of png."""
    if kind == "png":
        return to_png(image)
    from PIL.Image import Exif

    exif = Exif()
    if KEY in image.info:
        exif.get_ifd(EXIF)[COMMENT] = UTF16 + image.info[KEY].encode("utf-16-be")
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality, exif=exif)
    return buffer.getvalue()


def save(image: Image, path: str | os.PathLike[str]) -> Path:
    """Write the image with its settings, at once: a reader sees all of it or nothing.

    The name's ending says the kind of file; see `check_name` for what it raises.
    """
    path = Path(path)
    return write_bytes(path, to_file(image, check_name(path), QUALITY))


def check_name(path: Path) -> str:
    """The kind of image file that a name asks for; ValueError where it asks for none."""
    if path.suffix.lower() not in KINDS:
        kinds = ", ".join(KINDS)
        raise ValueError(f"the image's file is {str(path)!r}, expected a name ending in {kinds}.")
    if path.is_dir():
        raise ValueError(f"{path} is a directory, expected the name of an image file.")
    return KINDS[path.suffix.lower()]


def enlarge(image: Image, scale: int) -> Image:
    """Every pixel as a square of scale x scale of them; the settings say so."""
    larger = image.resize((image.width * scale, image.height * scale), 0)
    larger.info = dict(image.info)
    if KEY in image.info:
        settings = json.loads(image.info[KEY]) | {"scale": scale}
        larger.info[KEY] = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return larger


def settings_of(image: Image | str | os.PathLike[str]) -> dict[str, Any]:
    """How an image (or a file of ours) was made; {} where it does not say.

    ValueError, one sentence, where it says so in another form, or has more pixels than PIL takes.
    """
    from PIL import Image as images

    if not isinstance(image, images.Image):
        try:
            with images.open(image) as opened:
                opened.load()
                return settings_of(opened)
        except images.DecompressionBombError as error:
            raise ValueError(f"{image} is no image of d2m: {str(error)[:100]}.") from None
    value = image.info.get(KEY)
    if image.format in ("JPEG", "WEBP"):
        comment = image.getexif().get_ifd(EXIF).get(COMMENT)
        if isinstance(comment, bytes) and comment.startswith(UTF16):
            value = comment.removeprefix(UTF16).decode("utf-16-be", "replace")
    try:
        said = parse_json(value.encode("utf-8")) if isinstance(value, str) else {}
    except ValueError as error:
        raise ValueError(f"the image's {KEY} text is not valid JSON ({error}).") from None
    if not isinstance(said, dict):
        raise ValueError(f"the image's {KEY} text is {str(value)[:60]!r}, expected a JSON object.")
    return said
