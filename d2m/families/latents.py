"""What several families share: an AutoencoderKL's latents, noise, position ids, pooled text.

Letters: B batch, T image tokens, C channels of the VAE, h x w latent pixels, P pooled width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from d2m.families.flow import Config


def pixels_of(pipe: Any, images: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] -> [B, 3, H, W] in -1 to 1, where and as the VAE reads them."""
    vae = pipe.vae
    return images.permute(0, 3, 1, 2).to(vae.device).to(vae.dtype) / 127.5 - 1


def spatial_latents(pipe: Any, images: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] -> [B, C, h, w]: an AutoencoderKL's mean, shifted and scaled."""
    vae = pipe.vae
    latents = vae.encode(pixels_of(pipe, images)).latent_dist.mode()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def packed_noise(pipe: Any, height: int, width: int, generator: Any) -> Tensor:
    """Pure noise of one image, packed: [T, 4 C]."""
    import torch

    scale, channels = pipe.vae_scale_factor, pipe.transformer.config.in_channels // 4
    shape = (1, channels, height // scale, width // scale)
    return pipe._pack_latents(torch.randn(shape, generator=generator), *shape)[0]


def spatial_noise(pipe: Any, height: int, width: int, generator: Any) -> Tensor:
    """Pure noise of one image, [C, h, w]."""
    import torch

    scale, channels = pipe.vae_scale_factor, pipe.transformer.config.in_channels
    return torch.randn((channels, height // scale, width // scale), generator=generator)


def grid(rows: int, columns: int, device: Any) -> Tensor:
    """`img_ids` [rows * columns, 3]: every token's row and column, in columns 1 and 2."""
    import torch

    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(-1, 3)


def random_pooled_text(config: Config, n: int, generator: Any) -> dict[str, Tensor]:
    """Random pooled text [n, P]."""
    import torch

    size = int(config["pooled_projection_dim"])
    return {"pooled_projections": torch.randn(n, size, generator=generator)}
