"""What every patch of a training picture shows: names that half-way features learn to predict.

The velocity's squared error says little about a caption: most of it is noise that nothing can
predict, and a colour or a shape is read from the noisy picture itself but at the noisiest. Naming
what each patch of the clean picture will show, from the features between FLUX's two kinds of
blocks, asks for the caption at every noise level (ours; aligning such features with those of a
vision model is known to speed diffusion transformers up, and here the exact labels are known).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn


class Labelled(nn.Module):
    """A transformer in training, with a head on its features; the head goes afterwards."""

    def __init__(self, transformer: FluxTransformer2DModel, classes: Sequence[int]):
        super().__init__()
        width = transformer.inner_dim
        self.transformer = transformer
        self.classes = tuple(classes)
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, sum(classes))
        )
        self.seen: dict[str, Tensor] = {}
        self.watched = False

    def watch(self) -> None:
        """Keep the image tokens between double and single blocks of every pass from now on."""

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.seen["image"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        self.watched = True
        first = self.transformer.single_transformer_blocks[0]
        first.register_forward_pre_hook(keep, with_kwargs=True)

    def compile_repeated_blocks(self, **options: Any) -> None:
        self.transformer.compile_repeated_blocks(**options)

    def label_loss(self, labels: Tensor) -> Tensor:
        """Cross entropy of both names of every patch [B, T, 2], in nats, of the last pass."""
        tokens = self.seen["image"][:, : labels.shape[1]]  # reference tokens come after them
        parts = self.head(tokens.float()).split(self.classes, -1)
        losses = [
            F.cross_entropy(p.flatten(0, 1), labels[..., i].flatten()) for i, p in enumerate(parts)
        ]
        return torch.stack(losses).sum()
