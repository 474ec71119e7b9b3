"""Images that are given, as arrays: files opened, PIL and numpy read, resized.

Pixels are float32 [3, H, W] from -1 to 1, as VAEs encode them; masks [1, H, W], 0 or 1.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.files.checked_json import printable, show

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # of files; PIL knows more, which nobody needs to trust
MAX_GIVEN = 1 << 26  # pixels of an image that is given: 800 MB as float32
WANTED = "a PIL image or an array [H, W, 3] of uint8 or of floats from 0 to 1"
WANTED_MASK = "a PIL image or an array [H, W] of uint8, bool or floats from 0 to 1"


def open_image(source: str | os.PathLike[str] | bytes, what: str = "the image") -> Image:
    """The image in a file, or in a file's bytes, decoded; its size is checked before that.

    FileNotFoundError or ValueError, one sentence, for what is no image or is too large.
    """
    from PIL import Image as images

    name = what if isinstance(source, bytes) else f"{what} {printable(str(source))[:200]}"
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"{name} is no file, expected an image ({', '.join(FORMATS)}).")
    stream: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", images.DecompressionBombWarning)
            with images.open(stream, formats=FORMATS) as opened:
                check_area(*opened.size, name)
                opened.load()
                return opened.copy() if getattr(opened, "n_frames", 1) > 1 else opened
    except (images.UnidentifiedImageError, images.DecompressionBombError):
        raise ValueError(
            f"{name} is no image that can be read, expected one of {', '.join(FORMATS)} with at"
            f" most {MAX_GIVEN:,} pixels."
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        reason = printable(str(error))[:100]
        raise ValueError(f"{name} is damaged ({reason}), expected a whole image file.") from None


def check_area(width: int, height: int, name: str) -> None:
    """ValueError, one sentence, for an image of more pixels than are taken."""
    if width * height > MAX_GIVEN:
        raise ValueError(
            f"{name} has {width} x {height} pixels, expected at most {MAX_GIVEN:,} of them; make"
            " it smaller."
        )


def read_image(value: Any, name: str) -> np.ndarray:
    """An image [H, W, 3], uint8, or float32 from 0 to 1; `name` is that of the argument.

    What a camera has turned is turned back, what is transparent lies on white. ValueError, one
    sentence, for anything but WANTED.
    """
    from PIL import Image as images
    from PIL import ImageOps

    if isinstance(value, images.Image):
        check_area(*value.size, name)
        if value.mode.startswith("I;16"):  # as depth often comes
            grey = np.asarray(ImageOps.exif_transpose(value)).astype(np.float32) / 65535
            return np.repeat(grey[..., None], 3, axis=-1)
        if value.mode in ("I", "F") or value.mode.startswith("I;"):
            raise ValueError(
                f"{name} is a PIL image of mode {value.mode}, expected RGB or another mode of 8"
                " bits; scale it to 0 to 255 and convert it."
            )
        image = ImageOps.exif_transpose(value)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = images.new("RGBA", image.size, "white")
            image = images.alpha_composite(white, image)
        return np.asarray(image.convert("RGB"))
    if not isinstance(value, np.ndarray):
        kind = type(value).__name__
        cure = "; open a file with PIL.Image.open" if isinstance(value, str | os.PathLike) else ""
        raise ValueError(f"{name} is {kind} {show(value)[:60]}, expected {WANTED}{cure}.")
    if value.ndim != 3 or value.shape[2] != 3 or not value.size:
        raise ValueError(f"{name} is an array of shape {list(value.shape)}, expected {WANTED}.")
    check_area(value.shape[1], value.shape[0], name)
    return value if value.dtype == np.uint8 else unit_floats(value, name, WANTED)


def read_mask(value: Any, name: str = "mask") -> np.ndarray:
    """A mask [H, W], bool: True (white) where the image is to be repainted."""
    from PIL import Image as images
    from PIL import ImageOps

    if isinstance(value, images.Image):
        check_area(*value.size, name)
        grey = np.asarray(ImageOps.exif_transpose(value).convert("L"))
        return grey >= 128
    if not isinstance(value, np.ndarray):
        kind = type(value).__name__
        raise ValueError(f"{name} is {kind} {show(value)[:60]}, expected {WANTED_MASK}.")
    flat = value[..., 0] if value.ndim == 3 and value.shape[2] == 1 else value
    if flat.ndim != 2 or not flat.size:
        raise ValueError(
            f"{name} is an array of shape {list(value.shape)}, expected {WANTED_MASK}."
        )
    check_area(flat.shape[1], flat.shape[0], name)
    if flat.dtype == np.uint8:
        return np.asarray(flat >= 128)
    return flat if flat.dtype == np.bool_ else unit_floats(flat, name, WANTED_MASK) >= 0.5


def unit_floats(value: np.ndarray, name: str, wanted: str) -> np.ndarray:
    """float32 from 0 to 1; ValueError for another dtype or range."""
    if not np.issubdtype(value.dtype, np.floating):
        raise ValueError(f"{name} is an array of {value.dtype}, expected {wanted}.")
    if not np.isfinite(value).all() or value.min() < 0 or value.max() > 1:
        raise ValueError(f"{name} holds numbers outside 0 to 1, expected {wanted}.")
    return value.astype(np.float32)


def to_pixels(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W, 3] of `read_image` -> [3, height, width], float32 from -1 to 1; resized by Lanczos."""
    from PIL import Image as images

    if image.shape[:2] != (height, width):
        filtered = images.Resampling.LANCZOS
        if image.dtype == np.uint8:
            image = np.asarray(images.fromarray(image, "RGB").resize((width, height), filtered))
        else:
            planes = [images.fromarray(np.ascontiguousarray(image[..., i])) for i in range(3)]
            resized = [np.asarray(plane.resize((width, height), filtered)) for plane in planes]
            image = np.clip(np.stack(resized, axis=-1), 0, 1)
    unit = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
    return np.ascontiguousarray((2 * unit - 1).transpose(2, 0, 1), np.float32)


def to_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W] of `read_mask` -> [1, height, width], float32, 0 or 1."""
    from PIL import Image as images

    if mask.shape != (height, width):
        grey = images.fromarray(mask.astype(np.uint8) * 255, "L")
        mask = np.asarray(grey.resize((width, height), images.Resampling.LANCZOS)) >= 128
    return mask[None].astype(np.float32)
