"""The file of a picture as pixels of the size that a model is trained at."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

from calib.data.source import LARGEST, Damaged

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def pixels(data: bytes, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: turned as EXIF says, scaled to cover the size, the middle cut out.

    Transparency is laid on white. Damaged if `data` is no whole picture, so large that it must be a
    bomb, or of numbers without a known white (floats, 32-bit integers).
    """
    import numpy as np
    from PIL import Image, ImageOps

    if len(data) > LARGEST:
        raise Damaged(f"the picture's file has {len(data)} bytes, more than {LARGEST}")
    largest = 2 * max(height, width)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as opened:
            opened.draft("RGB", (largest, largest))  # of a JPEG: decode no more than is needed
            image = grey(ImageOps.exif_transpose(opened), opened.format)
            if "A" in image.getbands() or "transparency" in image.info:
                layer = image.convert("RGBA")
                image = Image.new("RGBA", layer.size, "white")
                image.alpha_composite(layer)
            image = image.convert("RGB")
            method = Image.Resampling.LANCZOS
            return np.asarray(ImageOps.fit(image, (width, height), method)).copy()
    except Damaged:
        raise
    except Exception as error:  # Pillow's plugins raise any kind on damaged files
        raise Damaged(f"no whole picture ({type(error).__name__}: {error})") from error


def grey(image: Image.Image, format: str | None) -> Image.Image:
    """A picture of 16-bit grey in 8 bits, as Pillow does not: it cuts values off at 255.

    Others are passed on. Damaged for numbers of which nobody says what is white.
    """
    import numpy as np
    from PIL import Image

    if image.mode[0] not in "IF":
        return image
    if not image.mode.startswith("I;16") and format != "PNG":
        raise Damaged(f"pixels are {image.mode!r} numbers without a known range; save it in 8 bits")
    values = np.asarray(image).astype(np.uint32)
    made = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:
        made.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return made
