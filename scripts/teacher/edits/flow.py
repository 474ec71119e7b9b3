"""Flow matching of the image after, beside the tokens of the image before, as FLUX.1 Kontext.

The reference tokens are clean latents behind the noisy ones; their position ids are those of the
same places with 1 on the first axis. The loss is on the noisy tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from scripts.teacher.cache import Cache
from scripts.teacher.flow import noised, velocity
from scripts.teacher.labels import Labelled
from scripts.teacher.loop import Loss, Run, train
from scripts.teacher.subject import Subject

GUIDANCE = 1.0  # the start's own conditional velocity: an edit needs no guidance


@dataclass(frozen=True)
class Pairs:
    """The images after, as any stage's cache has them, and those before: packed [N, T, C], CPU."""

    after: Cache
    before: Tensor

    @property
    def ids(self) -> dict[str, Tensor]:
        """Position ids of noisy and reference tokens, and the text's."""
        noisy = self.after.ids["img_ids"]
        reference = noisy.clone()
        reference[:, 0] = 1
        return {**self.after.ids, "img_ids": torch.cat([noisy, reference])}


def train_edits(
    run: Run,
    subject: Subject,
    pairs: Pairs,
    start: FluxTransformer2DModel,
    steps: int,
    lr: float,
    snapshot: Callable[[nn.Module], None],
    snapshot_every: int,
) -> FluxTransformer2DModel:
    """The average of a transformer that goes on from `start`."""
    model = Labelled(start, subject.label_classes).to(run.device)
    trained = train(
        run,
        "flow",
        model,
        edit_loss(run, model, pairs, subject.label_weight),
        steps=steps,
        lr=lr,
        warmup=100,
        decay_share=0.6,
        ema_decay=0.998,
        compile_blocks=run.compile,
        snapshot=lambda average: snapshot(average.transformer),
        snapshot_every=snapshot_every,
    )
    return trained.transformer


def edit_loss(run: Run, model: Labelled, pairs: Pairs, weight: float) -> Loss:
    """Squared error of the velocity of the noisy tokens, and the error in naming the patches."""
    ids, cache = pairs.ids, pairs.after

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        if not model.watched:
            model.watch()
        g = run.generator(19_000_003, step)
        pick = torch.randint(len(cache.rows), (run.batch,), generator=g)
        text = cache.text(run.own_rows(cache.rows[pick]))
        x, sigma, target = noised(run, cache.packed[cache.shown[pick]], g)
        reference = run.own_rows(pairs.before[pick]).to(run.device)
        with run.autocast():
            guidance = torch.full((len(x),), GUIDANCE, device=run.device)
            both = torch.cat([x, reference], 1)
            answer = velocity(model.transformer, both, sigma, guidance, text, ids)
        error = F.mse_loss(answer[:, : x.shape[1]], target)
        names = model.label_loss(run.own_rows(cache.labels[pick]).to(run.device))
        figures = {"velocity": round(error.item(), 4), "names": round(names.item(), 4)}
        return error + weight * names, figures

    return loss_of


def packed(latents: Tensor) -> Tensor:
    """Latents [N, C, h, w] in FLUX's 2 x 2 patches, [N, h/2 w/2, 4C]."""
    return FluxKontextPipeline._pack_latents(latents, *latents.shape)
