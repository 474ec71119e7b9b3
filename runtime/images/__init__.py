"""Images as inputs: what callers give becomes what a family denoises from.

pixels  Images that are given, as arrays: files opened, PIL and numpy read, resized
given   The images of a call, checked against the bundle: sizes, masks, strength
references Images that a model sees beside the noise, as tokens
latents Encoded images in the denoising: where it starts, what a mask keeps, more channels
"""

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from runtime.images.given import GivenImages, check_images
    from runtime.images.latents import ImageLatents
    from runtime.images.pixels import open_image

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "runtime.images.given": "GivenImages check_images",
        "runtime.images.latents": "ImageLatents",
        "runtime.images.pixels": "open_image",
    },
)
