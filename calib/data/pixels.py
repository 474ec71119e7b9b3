"""The file of a picture as pixels of the size that a model is trained at."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

from calib.data.source import LARGEST, Damaged

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def pixels(data: bytes, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: turned as EXIF says, scaled to cover the size, the middle cut out.

    Transparency is laid on white. Damaged if `data` is no whole picture, or so large
    that it must be a bomb.
    """
    import numpy as np
    from PIL import Image, ImageOps

    if len(data) > LARGEST:
        raise Damaged(f"the picture's file has {len(data)} bytes, more than {LARGEST}")
    largest = 2 * max(height, width)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as opened:
            opened.draft("RGB", (largest, largest))  # of a JPEG: decode no more than is needed
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                layer = image.convert("RGBA")
                image = Image.new("RGBA", layer.size, "white")
                image.alpha_composite(layer)
            image = image.convert("RGB")
            method = Image.Resampling.LANCZOS
            return np.asarray(ImageOps.fit(image, (width, height), method)).copy()
    except Exception as error:  # Pillow's plugins raise any kind on damaged files
        raise Damaged(f"no whole picture ({type(error).__name__}: {error})") from error
