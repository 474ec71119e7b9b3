"""What transformers and VAEs of several families have in common at their ends: patches, `Final`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Final(nn.Module):
    """What FLUX's, SD3's and Qwen-Image's transformers do after their blocks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm_out = model.norm_out
        self.proj_out = model.proj_out

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """[B, T, D], [B, D] -> velocity [B, T, channels]; SD3: channels of a pixel together."""
        return self.proj_out(self.norm_out(hidden_states, temb))


def patches(latents: Tensor, side: int) -> Tensor:
    """[n, C, h, w] -> tokens [n, T, C p p], p = `side`; in a token one channel after the other."""
    return F.unfold(latents, side, stride=side).transpose(1, 2)


def sample_patches(model: Any, output: Tensor) -> Tensor:
    """[n, C, h, w] -> patches [n, T, p p C], all channels of a pixel together."""
    cut = patches(output, model.config.patch_size)
    return cut.unflatten(-1, (output.shape[1], -1)).transpose(-1, -2).flatten(-2)


def kl_latents(vae: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest's `latents` has of an AutoencoderKL, by its config."""
    return {
        "channels": vae["latent_channels"],
        "vae_scale_factor": 2 ** (len(vae["block_out_channels"]) - 1),
        "scaling_factor": vae["scaling_factor"],
    }


def unscaled(pipe: Any, latents: Tensor, height: int = 0, width: int = 0) -> Tensor:
    """Latents [n, C, h, w] as an AutoencoderKL decodes them."""
    config = pipe.vae.config
    return latents / config.scaling_factor + (config.shift_factor or 0.0)


def check_packed(transformer: Mapping[str, Any], channels: int, directory: Path) -> None:
    """ValueError unless a token of the transformer is 2 x 2 latents of the VAE's `channels`."""
    if transformer.get("in_channels") != 4 * channels:
        raise ValueError(
            f"{directory} has a transformer of {transformer.get('in_channels')} input channels and"
            f" a VAE of {channels}, expected four times as many (2 x 2 latents a token); the"
            " components are of different models."
        )


def packed_latents(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], directory: Path
) -> dict[str, Any]:
    """A manifest's `latents` as FLUX.1 has them; ValueError where it packs another VAE's."""
    check_packed(transformer, vae["latent_channels"], directory)
    return kl_latents(vae) | {
        "shift_factor": vae.get("shift_factor"),
        "patch": 2,
        "rope_axes": list(transformer["axes_dims_rope"]),
        "rope_theta": 10000,
    }


def unpacked(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Packed latents -> [n, C, h, w], unscaled."""
    return unscaled(pipe, pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor))


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """What the pipeline's VAE makes of latents [n, C, h, w]: pixels [n, 3, H, W]."""
    pixels: Tensor = pipe.vae.decode(latents, return_dict=False)[0]
    return pixels


def encode(pipe: Any, pixels: Tensor) -> Tensor:
    """The mean latents [n, C, h, w] that the pipeline's VAE makes of pixels [n, 3, H, W]."""
    latents: Tensor = pipe.vae.encode(pixels).latent_dist.mean
    return latents
