"""What the transformer trains on, encoded once, since VAE and text encoders are frozen by then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import FluxPipeline
from torch import Tensor

from scripts.teacher.text import TextStage, Tokenizers, tokenise


@dataclass(frozen=True)
class Cache:
    """Packed latents of every scene and the embeddings of every distinct caption."""

    packed: Tensor  # [M, h/2 w/2, 4C], CPU: distinct latents in FLUX's 2 x 2 patches
    shown: Tensor  # int64 [N], CPU: a scene's latents among them
    labels: Tensor  # int64 [N, T, L], CPU: what each patch shows, see labels.py
    rows: Tensor  # int64 [N], CPU: a scene's caption among the distinct ones
    empty: int  # the empty caption among them
    pooled: Tensor  # [captions, 64], the device's
    sequence: Tensor  # [captions, L, 128], the device's
    ids: dict[str, Tensor]  # positions of image and text tokens, arguments of the transformer

    def text(self, rows: Tensor) -> dict[str, Tensor]:
        """Embeddings of the captions `rows` [B], as arguments of the transformer."""
        return {
            "pooled_projections": self.pooled[rows],
            "encoder_hidden_states": self.sequence[rows],
        }


def make_cache(
    latents: Tensor,
    shown: Tensor,
    labels: Tensor,
    captions: Sequence[str],
    stage: TextStage,
    tokenizers: Tokenizers,
    device: str,
) -> Cache:
    """Pack the latents [M, C, h, w] and encode the scenes' captions and the empty one."""
    n, channels, height, width = latents.shape
    distinct = sorted({*captions, ""})
    index = {caption: i for i, caption in enumerate(distinct)}
    pooled, sequence = [], []
    with torch.no_grad():
        for start in range(0, len(distinct), 256):
            clip_ids, t5_ids = tokenise(tokenizers, distinct[start : start + 256])
            one, many = stage.encode(clip_ids.to(device), t5_ids.to(device))
            pooled.append(one)
            sequence.append(many)
    positions = FluxPipeline._prepare_latent_image_ids(
        1, height // 2, width // 2, device, torch.float32
    )
    return Cache(
        packed=FluxPipeline._pack_latents(latents, n, channels, height, width),
        shown=shown,
        labels=labels,
        rows=torch.tensor([index[caption] for caption in captions]),
        empty=index[""],
        pooled=torch.cat(pooled),
        sequence=torch.cat(sequence),
        ids={"img_ids": positions, "txt_ids": torch.zeros(len(sequence[0][0]), 3, device=device)},
    )
