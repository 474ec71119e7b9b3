"""References: images that a model sees beside the noise, as tokens behind its tokens.

Every prompt of a call sees all of them. Whether a model takes any, at which sizes, and where they
stand says its family: FLUX.1 Kontext's one at 1 on the first axis of positions, FLUX.2's several at
10, 20, 30. Letters: n images, C channels of a token, R tokens of all references.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.families import family_of
from runtime.families.family import Family
from runtime.families.latents import Settings, reference_positions, rope
from runtime.images.pixels import read_image, to_pixels

log = logging.getLogger("runtime")


@dataclass(frozen=True)
class References:
    """The references of a checked call: [3, H, W] each, float32 from -1 to 1, of their own sizes.

    were: the width and height of each before it was made to fit.
    """

    pixels: tuple[np.ndarray, ...] = ()
    were: tuple[tuple[int, int], ...] = ()

    @property
    def resized(self) -> bool:
        """Whether any had to be made to fit."""
        return any(
            (width, height) != (each.shape[2], each.shape[1])
            for (width, height), each in zip(self.were, self.pixels)
        )


NO_REFERENCES = References()


@dataclass(frozen=True)
class ReferenceTokens:
    """Encoded references: tokens [1, R, C] as the transformer takes them, positions [R, axes]."""

    tokens: np.ndarray
    positions: np.ndarray

    def behind(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens [n, T, C] of the noise, these behind them: [n, T + R, C]."""
        own = np.broadcast_to(self.tokens, (len(tokens), *self.tokens.shape[1:]))
        return np.concatenate([tokens, own], axis=1)

    def placed(self, inputs: Mapping[str, np.ndarray], settings: Settings) -> dict[str, np.ndarray]:
        """A transformer's inputs with rotary tables that go on with these tokens."""
        tables = rope(self.positions, settings["rope_axes"], settings["rope_theta"])
        return dict(inputs) | {
            name: np.concatenate([inputs[name], table])
            for name, table in zip(("rope_cos", "rope_sin"), tables)
        }


def check_references(manifest: Mapping[str, Any], references: Any) -> References:
    """The references of a call, an image or several, resized to what the model sees.

    ValueError, one sentence, where it sees none or fewer, or for what is no image.
    """
    if references is None:
        return NO_REFERENCES
    several = isinstance(references, list | tuple)
    values: Sequence[Any] = references if several else [references]
    family = family_of(manifest)
    most = family.references(manifest)
    if not values:
        return NO_REFERENCES
    if not most:
        raise ValueError(
            "references are given, expected none: this model sees no images beside the noise; an"
            " image that it is to change is given as image (--image)."
        )
    if len(values) > most:
        raise ValueError(
            f"{len(values)} references are given, expected {'one' if most == 1 else 'at most'}"
            f"{'' if most == 1 else f' {most}'}, which is what this model sees."
        )
    images = [read_image(each, "a reference") for each in values]
    pixels = tuple(fitted(manifest, family, each) for each in images)
    were = tuple((each.shape[1], each.shape[0]) for each in images)
    for was, each in zip(were, pixels):
        if was != (each.shape[2], each.shape[1]):
            log.warning(
                "a reference of %d x %d pixels was made %d x %d, which the model takes",
                *was, each.shape[2], each.shape[1],
            )  # fmt: skip
    return References(pixels, were)


def fitted(manifest: Mapping[str, Any], family: Family, image: np.ndarray) -> np.ndarray:
    """An image [H, W, 3] as the model sees it: resized, then cut to its middle."""
    size, (height, width) = family.reference_size(manifest, *image.shape[:2])
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return to_pixels(image, *size)[:, top : top + height, left : left + width]


def reference_tokens(
    references: References,
    family: Family,
    settings: Settings,
    encode: Callable[[np.ndarray], np.ndarray],
) -> ReferenceTokens | None:
    """References encoded, None where there are none; encode: pixels [1, 3, H, W] -> [1, T, C]."""
    if not references.pixels:
        return None
    side = settings["vae_scale_factor"] * settings["patch"]
    sizes = [(each.shape[1] // side, each.shape[2] // side) for each in references.pixels]
    axes = len(settings["rope_axes"])
    return ReferenceTokens(
        tokens=np.concatenate([encode(each[None]) for each in references.pixels], axis=1),
        positions=reference_positions(sizes, family.reference_place, axes),
    )
