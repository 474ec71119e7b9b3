"""Encoded images in the denoising: where it starts, what a mask keeps, more channels.

Letters: n images, C latent channels, h x w latent pixels, f the VAE's scale factor, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.families.family import Family
from runtime.families.latents import Settings, pack
from runtime.images.given import CONTROL, FILL, GivenImages
from runtime.images.references import ReferenceTokens, reference_tokens

Encode = Callable[[np.ndarray], np.ndarray]  # pixels [n, 3, H, W] -> latents as denoised


@dataclass(frozen=True)
class ImageLatents:
    """What the images of a batch are to its denoising; latents are as the family denoises them.

    image [n, ...]: without noise, from which denoising starts; mask, of latents' shape but for
    channels: 1 where they are denoised and 0 where they stay the image's; channels [n, T, C']:
    beside those of the latents in every step; references: tokens behind theirs, the same for all n;
    states [1, N, R, 2 D]: keys and values in their place. None: there is none.
    """

    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    channels: np.ndarray | None = None
    references: ReferenceTokens | None = None
    states: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> ImageLatents:
        """Those rows of it."""
        image, mask, channels = (
            None if each is None else each[rows] for each in (self.image, self.mask, self.channels)
        )
        return ImageLatents(image, mask, channels, self.references, self.states)


NO_IMAGES = ImageLatents()


def image_latents(
    given: GivenImages, part: slice, family: Family, settings: Settings, encode: Encode
) -> ImageLatents:
    """The images `part` of a call, encoded."""
    kind = settings.get("condition")
    image, mask, control = (
        None if each is None else each[part] for each in (given.image, given.mask, given.control)
    )
    channels = None
    if kind == FILL:
        assert image is not None and mask is not None
        visible = encode(image * (mask < 0.5))
        channels = np.concatenate([visible, mask_channels(mask, settings)], axis=-1)
        mask = None  # the model itself keeps what is not repainted
    elif kind == CONTROL:
        assert control is not None
        channels = encode(control)
    return ImageLatents(
        image=None if image is None else encode(image),
        mask=None if mask is None else latent_mask(mask, family, settings),
        channels=channels,
        references=reference_tokens(given.references, family, settings, encode),
    )


def no_channels(manifest: Mapping[str, Any], latents: np.ndarray) -> np.ndarray | None:
    """Zeros in place of the channels that a model reads beside packed `latents`, where it does."""
    read = manifest["components"]["transformer"]["inputs"]["hidden_states"]["shape"][-1]
    if read == latents.shape[-1] or not manifest["latents"].get("condition"):
        return None
    return np.zeros((*latents.shape[:-1], read - latents.shape[-1]), np.float32)


def latent_mask(mask: np.ndarray, family: Family, settings: Settings) -> np.ndarray:
    """[n, 1, H, W] -> as the family's latents, of every latent pixel its first pixel's value."""
    f = settings["vae_scale_factor"]
    small = mask[:, :, ::f, ::f]
    n, _, height, width = small.shape
    return family.arrange(np.broadcast_to(small, (n, settings["channels"], height, width)))


def mask_channels(mask: np.ndarray, settings: Settings) -> np.ndarray:
    """[n, 1, H, W] -> tokens [n, T, 4 f f]: all pixels of a token, as FLUX.1 Fill reads them."""
    f = settings["vae_scale_factor"]
    n, _, height, width = mask.shape
    cut = mask.reshape(n, height // f, f, width // f, f).transpose(0, 2, 4, 1, 3)
    return pack(cut.reshape(n, f * f, height // f, width // f))
