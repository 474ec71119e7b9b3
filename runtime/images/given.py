"""The images of a call, checked against the bundle: sizes, masks, strength.

What comes out fits the bundle: all images have the size that is generated.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.families import family_of
from runtime.families.flux import REFERENCE
from runtime.files.checked_json import is_number, show
from runtime.images.pixels import read_image, read_mask, to_mask, to_pixels
from runtime.images.references import NO_REFERENCES, References, check_references

log = logging.getLogger("runtime")
STRENGTH = 0.6  # of image to image, as diffusers has it
FILL, CONTROL = "fill", "control"  # kinds of models that read an image in every step


@dataclass(frozen=True)
class GivenImages:
    """The images of a checked call, one an image that is generated; None: none was given.

    image, control: [n, 3, H, W], float32 from -1 to 1; mask [n, 1, H, W], 1 where it is repainted.
    strength: how much of the denoising is done, 0 to 1. were: the width and height of each `image`
    (or `control`) before it was made to fit; None where it fitted.
    """

    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    control: np.ndarray | None = None
    strength: float = 1.0
    were: tuple[tuple[int, int] | None, ...] = ()
    references: References = NO_REFERENCES

    def first_step(self, steps: int) -> int:
        """The first of `steps` that is taken; rounded as diffusers does, but the last always is."""
        return min(int(max(steps - min(steps * self.strength, steps), 0)), steps - 1)

    def settings(self, index: int) -> dict[str, Any]:
        """What image `index` says of the images that it was made from."""
        found: dict[str, Any] = {}
        for name in ("image", "mask", "control"):
            pixels = getattr(self, name)
            if pixels is not None:
                found[name] = digest(pixels[index])
        if self.image is not None:
            found["strength"] = self.strength
        if self.references.pixels:
            found["references"] = [digest(each) for each in self.references.pixels]
        if self.references.resized:
            found["reference_sizes"] = [list(size) for size in self.references.were]
        was = self.were[index] if self.were else None
        return found | ({} if was is None else {"image_size": list(was)})


NOTHING = GivenImages()


def digest(pixels: np.ndarray) -> str:
    """SHA-256 of an image's pixels [C, H, W], as they are encoded."""
    data = np.ascontiguousarray(pixels, "<f4")
    return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()


def check_images(
    manifest: Mapping[str, Any],
    prompts: int,
    n: int,
    height: int | None,
    width: int | None,
    *,
    image: Any = None,
    mask: Any = None,
    control: Any = None,
    strength: float | None = None,
    references: Any = None,
) -> tuple[GivenImages, int | None, int | None]:
    """The images of a call of `prompts` prompts, `n` images each, and the size to generate.

    `height`, `width`: as asked for, multiples of what the model takes, or None: the image's, made
    smaller where the model does not take it, or that of the first reference. ValueError, one
    sentence.
    """
    kind = manifest["latents"].get("condition")
    check_together(kind, image, mask, control, strength)
    seen = check_references(manifest, references)
    if image is None and control is None and not seen.pixels:
        return NOTHING, height, width
    check_encoder(manifest)
    if image is None and control is None:
        first_seen = seen.pixels[0].shape  # [3, H, W]
        height, width = height or first_seen[1], width or first_seen[2]
        return GivenImages(references=seen), height, width
    images = read_all("image", image, prompts, read_image)
    controls = read_all("control", control, prompts, read_image)
    masks = read_all("mask", mask, prompts, read_mask)
    for index in range(max(len(images), len(masks)) if masks else 0):
        one, other = images[index % len(images)], masks[index % len(masks)]
        if one.shape[:2] != other.shape[:2]:
            raise ValueError(
                f"the mask has {other.shape[1]} x {other.shape[0]} pixels and the image"
                f" {one.shape[1]} x {one.shape[0]}, expected the same size."
            )
    given_sizes = [(each.shape[0], each.shape[1]) for each in images or controls]
    height, width = fitting(manifest, *given_sizes[0], height, width)
    fitted_masks = [to_mask(each, height, width) for each in masks]
    if not all(each.any() for each in fitted_masks):
        raise ValueError(
            "the mask is black, expected white where the image is to be repainted (of uint8: 255)."
        )
    for own_height, own_width in dict.fromkeys(given_sizes):
        if (own_height, own_width) != (height, width):
            log.warning(
                "the image of %d x %d pixels was made %d x %d, which the model takes",
                own_width, own_height, width, height,
            )  # fmt: skip
    were = [None if size == (height, width) else size[::-1] for size in given_sizes]
    default = 1.0 if masks else STRENGTH
    given = GivenImages(
        image=rows([to_pixels(each, height, width) for each in images], prompts, n),
        mask=rows(fitted_masks, prompts, n),
        control=rows([to_pixels(each, height, width) for each in controls], prompts, n),
        strength=(default if image is not None else 1.0) if strength is None else float(strength),
        were=tuple(were[0 if len(were) == 1 else i // n] for i in range(prompts * n)),
        references=seen,
    )
    return given, height, width


def example_images(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Images for a call that only measures: those that the bundle's model is made for."""
    height, width = (manifest["defaults"][name] for name in ("height", "width"))
    grey = np.full((height, width, 3), 127, np.uint8)
    half = np.arange(width)[None, :].repeat(height, axis=0) >= width // 2
    kinds: dict[str, dict[str, Any]] = {
        FILL: {"image": grey, "mask": half},
        CONTROL: {"control": grey},
        REFERENCE: {"references": [grey]},
    }
    return kinds.get(manifest["latents"].get("condition", ""), {})


def taken_images(manifest: Mapping[str, Any]) -> dict[str, int]:
    """What images a bundle takes for one that it generates, by argument, and how many of each."""
    if "vae_encoder" not in manifest["components"]:
        return {}
    most = family_of(manifest).references(manifest)
    if manifest["latents"].get("condition") == CONTROL:
        return {"image": 1, "mask": 1, "control": 1}
    return {"image": 1, "mask": 1} | ({"references": most} if most else {})


def check_encoder(
    manifest: Mapping[str, Any], whose: str = "this bundle", what: str = "images as inputs need"
) -> None:
    """ValueError, one sentence, where a bundle has no VAE encoder for images that are given."""
    if "vae_encoder" not in manifest["components"]:
        raise ValueError(
            f"{whose} has no vae_encoder, which {what}; add it with d2m export PIPELINE"
            " --add-vae-encoder BUNDLE, or export the pipeline again."
        )


def check_together(kind: str | None, image: Any, mask: Any, control: Any, strength: Any) -> None:
    """ValueError unless what is given belongs together and to a model of this kind."""
    if strength is not None:
        if not is_number(strength) or not 0 < strength <= 1:
            raise ValueError(f"strength is {show(strength)}, expected a number above 0, at most 1.")
        if image is None:
            raise ValueError(
                f"strength is {strength} but there is no image, expected one that it changes."
            )
    if mask is not None and image is None:
        raise ValueError("a mask is given but no image, expected the image that it is of.")
    if kind == FILL and (image is None or mask is None):
        lacks = "image" if image is None else "mask"
        raise ValueError(
            f"no {lacks} is given, expected one: this model fills the masked part of an image."
        )
    if kind == CONTROL and control is None:
        raise ValueError(
            "no control image is given, expected one, such as edges or depth: this model follows it"
            " in every step."
        )
    if kind != CONTROL and control is not None:
        raise ValueError(
            "a control image is given, expected none: this bundle's model reads no such image."
        )


def read_all(name: str, value: Any, prompts: int, read: Any) -> list[Any]:
    """One image, or one a prompt, each read; none where None is given."""
    if value is None:
        return []
    several = isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 4)
    values: Sequence[Any] = value if several else [value]
    if len(values) not in (1, prompts):
        raise ValueError(
            f"{name} lists {len(values)} images for {prompts} prompts, expected one, or one per"
            " prompt."
        )
    return [read(each, name) for each in values]


def rows(images: Sequence[np.ndarray], prompts: int, n: int) -> np.ndarray | None:
    """One row for each of the images that are generated; one image for all is stored once."""
    if not images:
        return None
    if len(images) == 1:
        return np.broadcast_to(images[0], (prompts * n, *images[0].shape))
    return np.repeat(np.stack(images), n, axis=0)


def fitting(
    manifest: Mapping[str, Any], rows: int, columns: int, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width to generate from an image of `rows` x `columns` pixels.

    What is not given is the image's, made smaller to what the model takes: whole tokens, and of an
    image that is too large the same shape.
    """
    factor = manifest["latents"]["vae_scale_factor"] * manifest["latents"]["patch"]
    most = family_of(manifest).largest(manifest)
    scale = min(1.0, most / max(rows, columns))
    found = []
    for name, given, own in (("height", height, rows), ("width", width, columns)):
        size = int(own * scale) // factor * factor
        if given is None and not size:
            raise ValueError(
                f"the image has a {name} of {own} pixels, expected at least {factor}; make it"
                " larger, or give height and width."
            )
        found.append(size if given is None else given)
    return found[0], found[1]
