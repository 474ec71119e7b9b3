"""Stage 1: a VAE that makes 4 x 8 x 8 latents of 32 x 32 images, 16 x 8 x 8 of 64 x 64."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from scripts.teacher.loop import Loss, Run, train
from scripts.teacher.state import load_state, save_state
from scripts.teacher.subject import Subject


def as_float(images: Tensor) -> Tensor:
    """uint8 0..255 as float32 -1..1, what a VAE of diffusers takes."""
    return images.float() / 127.5 - 1


def make_vae(subject: Subject) -> AutoencoderKL:
    sizes = {"latent_channels": 16, **subject.vae}
    levels = len(sizes["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=subject.size,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        **sizes,
    )


def train_vae(
    run: Run,
    subject: Subject,
    images: Tensor,
    shown: Tensor,
    steps: int,
    init: Path | None = None,
    decoder_steps: int = 0,
) -> AutoencoderKL:
    """A frozen VAE of the world's images, uint8 [M, 3, S, S]: a new one, or that of `init`.

    shown: every scene's image, int64 [N]; an image is learnt as often as scenes show it.
    decoder_steps: how long the decoder of `init` learns on alone, so that all latents stay.
    """
    if init is not None:
        vae = AutoencoderKL.from_pretrained(init, subfolder="vae", torch_dtype=torch.float32)
        vae = vae.to(run.device).eval().requires_grad_(False)
        if decoder_steps:
            vae.decoder.requires_grad_(True)
            loss_of = vae_loss(run, vae, images, shown, subject.vae_batch, decoder_alone=True)
            train(
                run, "decoder", vae.decoder, loss_of, steps=decoder_steps, lr=1e-3, decay_share=0.8
            )
        return vae.requires_grad_(False)
    vae = make_vae(subject).to(run.device)
    loss_of = vae_loss(run, vae, images, shown, subject.vae_batch)
    train(run, "vae", vae, loss_of, steps=steps, lr=2.5e-3, decay_share=0.5)
    return vae.eval().requires_grad_(False)


def vae_loss(
    run: Run,
    vae: AutoencoderKL,
    images: Tensor,
    shown: Tensor,
    batch: int,
    decoder_alone: bool = False,
) -> Loss:
    """Reconstruction (L1 and MSE) and a light KL term; logs the PSNR in dB.

    decoder_alone: the encoder is frozen, so there is no KL term, and the batches are others.
    """
    factor = 1_000_007 if decoder_alone else 1_000_003

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = run.generator(factor, step)
        pick = shown[torch.randint(len(shown), (batch,), generator=g)]
        x = as_float(images[pick]).to(run.device)
        with run.autocast():
            with torch.set_grad_enabled(not decoder_alone):
                posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=g).to(mean)
            y = vae.decode(z).sample.float()
        mse = F.mse_loss(y, x)
        # The edges decide what the verifier sees: L1 keeps them sharp, MSE the flat colours right.
        loss = F.l1_loss(y, x) + 4 * mse
        if not decoder_alone:
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = loss + 1e-3 * kl
        return loss, {"psnr": round(10 * math.log10(4 / max(mse.item(), 1e-9)), 2)}

    return loss_of


@torch.no_grad()
def encode(run: Run, vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Means of the latents, float32 [N, C, h, w] on the CPU."""
    rows = []
    for chunk in images.split(256):
        with run.autocast():
            x = as_float(chunk).to(run.device)
            rows.append(vae.encode(x).latent_dist.mean.float().cpu())
    return torch.cat(rows)


def latents_of(run: Run, vae: AutoencoderKL, images: Tensor, trained: bool = False) -> Tensor:
    """Latents of all pictures, float32 [N, C, h, w], of mean 0 and deviation 1.

    Shift and scale go to the VAE's config, where pipelines look for them; trained: they are there,
    and a transformer has learnt with them. The latents as encoded are kept in the work directory:
    minutes that a resumed run need not repeat.
    """
    kept = run.work / "latents.safetensors"
    if not kept.exists():
        save_state(kept, {"latents": encode(run, vae, images)}, {})
    latents = load_state(kept)[0]["latents"]
    if not trained:
        vae.register_to_config(
            shift_factor=round(latents.mean().item(), 6),
            scaling_factor=round(1 / latents.std().item(), 6),
        )
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor
