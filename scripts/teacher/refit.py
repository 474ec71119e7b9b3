"""A trained transformer gets other text encoders: its two text embedders, refitted in closed form.

Embeddings of new encoders mean nothing to a transformer trained with others (one of 6.7 M answers
with velocities of 400). But encoders of the same captions say nearly the same: a linear map from
the new embeddings to the old ones, found by least squares, leaves 2 % of the variance of CLIP's
pooled vectors unexplained and 11 % of T5's tokens', and goes into the embedders' weights. The
loss is then what it was, and training goes on from there (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from scripts.teacher.subject import Subject
from scripts.teacher.text import TextStage, Tokenizers, load_text, tokenise

CAPTIONS = 4000  # at most
RIDGE = 1e-2  # of the new embeddings' unit variance: keeps directions without any from blowing up


@torch.no_grad()
def refitted(
    init: Path,
    subject: Subject,
    captions: Sequence[str],
    stage: TextStage,
    tokenizers: Tokenizers,
    device: str,
) -> FluxTransformer2DModel:
    """The transformer of the pipeline `init` (float32, CPU) made to read `stage`'s embeddings."""
    model = FluxTransformer2DModel.from_pretrained(
        init, subfolder="transformer", torch_dtype=torch.float32
    )
    old, _ = load_text(init, subject, "cpu")
    distinct = sorted({*captions, ""})
    ids = tokenise(tokenizers, [*distinct[:: -(-len(distinct) // CAPTIONS)], ""])
    olds = old.encode(*ids)
    news = [part.cpu() for part in stage.encode(*(part.to(device) for part in ids))]
    embedders = (model.time_text_embed.text_embedder.linear_1, model.context_embedder)
    for embedder, new, known in zip(embedders, news, olds, strict=True):
        refit(embedder, new.flatten(0, -2), known.flatten(0, -2))
    return model


def refit(embedder: nn.Linear, new: Tensor, old: Tensor) -> None:
    """Change `embedder` in place: of new [N, C] it makes what it made of old [N, C], nearly."""
    new, old = new.double(), old.double()
    centre, target = new.mean(0), old.mean(0)
    eye = RIDGE * len(new) ** 0.5 * torch.eye(new.shape[1], dtype=torch.float64)
    rows = torch.cat([new - centre, eye])
    wanted = torch.cat([old - target, torch.zeros(len(eye), old.shape[1], dtype=torch.float64)])
    mapping = torch.linalg.lstsq(rows, wanted).solution
    weight = embedder.weight.double()
    embedder.bias += (weight @ (target - centre @ mapping)).float()
    embedder.weight.copy_(weight @ mapping.T)
