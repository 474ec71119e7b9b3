"""What several families share: an AutoencoderKL's latents, noise, position ids, pooled text.

Letters: B batch, T image tokens, L text tokens, C channels of the VAE, h x w latent pixels, P
pooled width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from d2m.families.flow import Batch, Config


DIFFERS = 16  # of 255 in any channel (ours): less is what saving an image as JPEG may do


def pixels_of(pipe: Any, images: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] -> [B, 3, H, W] in -1 to 1, where and as the VAE reads them."""
    vae = pipe.vae
    return images.permute(0, 3, 1, 2).to(vae.device).to(vae.dtype) / 127.5 - 1


def spatial_latents(pipe: Any, images: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] -> [B, C, h, w]: an AutoencoderKL's mean, shifted and scaled."""
    vae = pipe.vae
    latents = vae.encode(pixels_of(pipe, images)).latent_dist.mode()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def packed_latents(pipe: Any, images: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] -> [B, T, 4 C]: `spatial_latents`, 2 x 2 of them a token."""
    latents = spatial_latents(pipe, images)
    packed: Tensor = pipe._pack_latents(latents, *latents.shape)
    return packed


def changed_boxes(before: Tensor, after: Tensor) -> Tensor:
    """The box of the pixels that differ, bool [B, H, W], of images uint8 [B, H, W, 3]; all of an
    image where none does. What a model is told to paint where data have no mask.
    """
    differ = (after.int() - before.int()).abs().amax(-1) >= DIFFERS

    def between(marks: Tensor) -> Tensor:
        """bool [B, N]: from the first mark to the last."""
        return (marks.int().cumsum(1) > 0) & (marks.int().flip(1).cumsum(1).flip(1) > 0)

    rows, columns = between(differ.any(2)), between(differ.any(1))
    boxes = rows[:, :, None] & columns[:, None, :]
    return boxes | ~differ.any(2).any(1)[:, None, None]


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


def joint_ids(pipe: Any, batch: Batch, height: int, width: int) -> dict[str, Tensor]:
    """`img_ids` [T, 3] and `txt_ids` [L, 3], nought, as FLUX.1's pipeline makes them."""
    import torch

    latents, states = batch["latents"], batch["encoder_hidden_states"]
    rows, columns = (size // (2 * pipe.vae_scale_factor) for size in (height, width))
    ids = pipe._prepare_latent_image_ids(len(latents), rows, columns, latents.device, latents.dtype)
    zeros = torch.zeros(states.shape[1], 3, device=latents.device, dtype=states.dtype)
    return {"img_ids": ids, "txt_ids": zeros}


def random_pooled_text(config: Config, n: int, generator: Any) -> dict[str, Tensor]:
    """Random pooled text [n, P]."""
    import torch

    size = int(config["pooled_projection_dim"])
    return {"pooled_projections": torch.randn(n, size, generator=generator)}
