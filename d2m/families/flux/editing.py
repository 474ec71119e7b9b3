"""FLUX.1's pipelines that are given an image: Kontext, Fill, and Control (Canny and Depth).

Kontext's image is a reference: its packed latents stand behind the noisy tokens, with 1 on the
first axis of their position ids. Fill's and Control's is in channels behind those of every noisy
token: Fill's the image without what is to be painted, and the mask; Control's the control image.
Only noisy tokens have a prediction. Letters: B batch, T image tokens, R reference tokens, C packed
channels, H x W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2m.families.family import PAIRS
from d2m.families.latents import joint_ids, packed_latents, pixels_of

if TYPE_CHECKING:
    from torch import Tensor

    from d2m.families.flow import Batch

KONTEXT, FILL, CONTROL = "FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline"
# Class -> the training data it learns from: the worlds of ours are edited by instructions alone.
EDITORS = {KONTEXT: PAIRS, FILL: PAIRS[1:], CONTROL: PAIRS[1:]}


def kind_of(pipe: Any) -> str | None:
    """Which of EDITORS a pipeline is; None: FluxPipeline, which is given no image."""
    return next((cls.__name__ for cls in type(pipe).__mro__ if cls.__name__ in EDITORS), None)


def given(pipe: Any, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What the transformer sees of images before: `reference` [B, R, C] or `channels` [B, T, C].

    images uint8 [B, H, W, 3]; mask bool [B, H, W], true where Fill paints; the others do not read
    it. Means of the VAE, where diffusers takes a sample for Fill and Control.
    """
    kind = kind_of(pipe)
    if kind == KONTEXT:
        return {"reference": packed_latents(pipe, images)}
    if kind == CONTROL:
        return {"channels": packed_latents(pipe, images)}
    assert kind == FILL, type(pipe)
    import torch

    pixels = pixels_of(pipe, images)
    painted = mask[:, None].to(pixels)
    means = pipe.vae.encode(pixels * (1 - painted)).latent_dist.mode()
    parts = pipe.prepare_mask_latents(
        painted, means, len(means), means.shape[1], 1, *images.shape[1:3],
        pixels.dtype, pixels.device, None,
    )  # fmt: skip
    return {"channels": torch.cat([parts[1], parts[0].to(pixels)], -1)}


def with_given(batch: Batch, x: Tensor) -> Tensor:
    """Noisy latents x [B, T, C] as the transformer takes them, with what the batch says is given.

    [B, T + R, C] or [B, T, C + C'].
    """
    import torch

    if "reference" in batch:
        return torch.cat([x, batch["reference"].to(x)], 1)
    return torch.cat([x, batch["channels"].to(x)], 2) if "channels" in batch else x


def position_ids(pipe: Any, batch: Batch, height: int, width: int) -> dict[str, Tensor]:
    """`joint_ids`, those of reference tokens behind the others: of the same size, 1 on axis 0."""
    import torch

    found = joint_ids(pipe, batch, height, width)
    if "reference" in batch:
        own = found["img_ids"].clone()
        own[:, 0] = 1
        found["img_ids"] = torch.cat([found["img_ids"], own])
    return found


def noise(pipe: Any, height: int, width: int, generator: Any) -> Tensor:
    """Pure noise of one image, packed [T, C]: of as many channels as the transformer answers."""
    import torch

    config, scale = pipe.transformer.config, pipe.vae_scale_factor
    channels = (config.out_channels or config.in_channels) // 4
    shape = (1, channels, height // scale, width // scale)
    packed: Tensor = pipe._pack_latents(torch.randn(shape, generator=generator), *shape)[0]
    return packed


def generate(pipe: Any, keywords: dict[str, Any]) -> Any:
    """The pipeline's answer to FluxPipeline's keywords and `images`, PIL images, one a prompt.

    Kontext keeps the height and width that it is given, which need not be those of its list.
    """
    keywords, kind = dict(keywords), kind_of(pipe)
    images = keywords.pop("images", None)
    if images is not None:
        if kind != KONTEXT:
            raise ValueError(
                f"{type(pipe).__name__} does not edit by an image and an instruction alone; "
                f"expected a {KONTEXT}"
            )
        keywords["image"] = list(images)
    if kind == KONTEXT:
        keywords |= {"max_area": keywords["height"] * keywords["width"], "_auto_resize": False}
    return pipe(**keywords)
