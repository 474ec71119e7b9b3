"""Stages 3 and 4: the transformer learns flow matching, then guidance in a single pass.

As FLUX.1 [dev] came to be: x_s = (1 - s) x + s noise with s in (0, 1), the velocity noise - x to
be predicted from x_s; and of the result a student that does with a guidance embedding in one pass
what classifier-free guidance does in two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from scripts.teacher.cache import Cache
from scripts.teacher.labels import Labelled
from scripts.teacher.loop import Loss, Run, train
from scripts.teacher.subject import Subject

DROPPED = 0.1  # share of captions left out, so that the model learns to generate without one
# These and the output start at zero, so that every block begins as the identity (adaLN-zero).
ZEROED = ("norm1", "norm.linear", "norm_out.linear")

Snapshot = Callable[[nn.Module], None]


def make_transformer(subject: Subject) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=4 * subject.vae.get("latent_channels", 16),
        attention_head_dim=32,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
        **subject.transformer,
    )
    for name, parameter in model.named_parameters():
        if name.startswith("proj_out") or any(part in name for part in ZEROED):
            nn.init.zeros_(parameter)
    return model


def train_flow(
    run: Run,
    subject: Subject,
    cache: Cache,
    steps: int,
    lr: float,
    snapshot: Snapshot,
    snapshot_every: int,
    start: FluxTransformer2DModel | None = None,
) -> FluxTransformer2DModel:
    """The average of a transformer trained by flow matching, from nothing or from `start`."""
    model = Labelled(make_transformer(subject) if start is None else start, subject.label_classes)
    model = model.to(run.device)
    trained = train(
        run,
        "flow",
        model,
        flow_loss(run, model, cache, subject.label_weight),
        steps=steps,
        lr=lr,
        warmup=200,
        decay_share=0.7,
        ema_decay=0.999,
        compile_blocks=run.compile,
        snapshot=lambda average: snapshot(average.transformer),
        snapshot_every=snapshot_every,
    )
    return trained.transformer


def train_guidance(
    run: Run,
    teacher: FluxTransformer2DModel,
    cache: Cache,
    steps: int,
    lr: float,
    snapshot: Snapshot,
    snapshot_every: int,
    largest: float = 5.0,
) -> FluxTransformer2DModel:
    """The average of a student that starts as `teacher` and learns its guided velocity."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    if run.compile:  # after the copy, which has to be of plain modules
        teacher.compile_repeated_blocks(dynamic=False)
    return train(
        run,
        "guidance",
        student,
        guidance_loss(run, student, teacher, cache, largest),
        steps=steps,
        lr=lr,
        warmup=50,
        decay_share=0.7,
        ema_decay=0.99,
        compile_blocks=run.compile,
        snapshot=snapshot,
        snapshot_every=snapshot_every,
    )


def noised(run: Run, latents: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random noise and times for latents [B, T, C]: (x_s, s [B], velocity), on the run's device.

    s = sigmoid(N(1, 1.2)): more of the noisy end than of the clean (ours). Of several processes
    each gets its own rows of the batch.
    """
    x = run.own_rows(latents).to(run.device)
    noise = run.own_rows(torch.randn(latents.shape, generator=g)).to(run.device)
    normal = torch.randn(len(latents), generator=g)
    sigma = run.own_rows(torch.sigmoid(normal * 1.2 + 1.0)).to(run.device)
    s = sigma[:, None, None]
    return (1 - s) * x + s * noise, sigma, noise - x


def velocity(
    model: FluxTransformer2DModel,
    x: Tensor,
    sigma: Tensor,
    guidance: Tensor,
    text: dict[str, Tensor],
    ids: dict[str, Tensor],
) -> Tensor:
    """The model's answer in float32 [B, T, C] to x [B, T, C], sigma [B] and guidance [B]."""
    answer = model(
        hidden_states=x, timestep=sigma, guidance=guidance, return_dict=False, **text, **ids
    )
    return answer[0].float()


def flow_loss(run: Run, model: Labelled, cache: Cache, weight: float) -> Loss:
    """Squared error of the velocity, with captions left out at random and guidance always 1.

    And the error in naming the patches, see labels.py.
    """

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        if not model.watched:  # not earlier: the average is a copy without a hook
            model.watch()
        g = run.generator(13_000_003, step)
        pick = torch.randint(len(cache.rows), (run.batch,), generator=g)
        dropped = torch.rand(run.batch, generator=g) < DROPPED
        text = cache.text(run.own_rows(torch.where(dropped, cache.empty, cache.rows[pick])))
        x, sigma, target = noised(run, cache.packed[cache.shown[pick]], g)
        with run.autocast():
            one = torch.ones(len(x), device=run.device)
            answer = velocity(model.transformer, x, sigma, one, text, cache.ids)
        error = F.mse_loss(answer, target)
        names = model.label_loss(run.own_rows(cache.labels[pick]).to(run.device))
        figures = {"velocity": round(error.item(), 4), "names": round(names.item(), 4)}
        return error + weight * names, figures

    return loss_of


def guidance_loss(
    run: Run,
    model: FluxTransformer2DModel,
    teacher: FluxTransformer2DModel,
    cache: Cache,
    largest: float,
) -> Loss:
    """One pass with guidance g learns v_empty + g (v_caption - v_empty) of the teacher.

    g is drawn from 1 to `largest`.
    """

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = run.generator(17_000_003, step)
        pick = torch.randint(len(cache.rows), (run.batch,), generator=g)
        x, sigma, _ = noised(run, cache.packed[cache.shown[pick]], g)
        scale = run.own_rows(1 + (largest - 1) * torch.rand(run.batch, generator=g)).to(run.device)
        rows = run.own_rows(cache.rows[pick])
        with torch.no_grad(), run.autocast():
            both = cache.text(torch.cat([rows, torch.full_like(rows, cache.empty)]))
            ones = torch.ones(2 * len(x), device=run.device)
            pair = velocity(teacher, x.repeat(2, 1, 1), sigma.repeat(2), ones, both, cache.ids)
            caption, empty = pair.chunk(2)
            target = empty + scale[:, None, None] * (caption - empty)
        with run.autocast():
            answer = velocity(model, x, sigma, scale, cache.text(rows), cache.ids)
        return F.mse_loss(answer, target), {}

    return loss_of
