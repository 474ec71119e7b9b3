"""Groups of blocks in a program: which calls belong to one, and how its router is traced.

A group's router is a block type as any other: its inputs are the program's tensors, its weights
are graph inputs, its output is a logit per block. It computes in float32 whatever the bundle does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2m.model.block_group import TEXT_MASK, BlockGroup, Router, SkippedBlock, pool
from export.graph.trace import Spec

LOGITS = "logits"  # what a router writes, [B, m]
MASKS = (TEXT_MASK, "text_reach")  # what programs call the text's mask [B, L]: one of them


@dataclass(frozen=True)
class Group:
    """A group in a program: its router's type and weight prefix, and the calls it chooses from.

    `calls` are consecutive places in the program's list of calls. alpha: see
    d2m.model.block_group.Router.
    """

    type: str
    prefix: str
    calls: tuple[int, ...]
    alpha: float


class ExportRouter(nn.Module):
    """d2m.model.block_group.Router for tracing: without autocast, which no exported graph has."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router, self.alpha = router, router.alpha

    def forward(self, temb: Tensor, **streams: Tensor) -> Tensor:
        """temb [B, D] and, unless alpha is 0, both streams [B, T, D] -> logits [B, m], float32.

        And the mask of the text [B, L], where a family has one.
        """
        weights = self.router.embedding.weight, self.router.tokens.weight
        logits = (1 - self.alpha) * torch.matmul(temb.float(), weights[0].t())
        if self.alpha:
            order = (streams["hidden_states"], streams["encoder_hidden_states"])
            mask = next((streams[name] for name in MASKS if name in streams), None)
            pooled = pool(*order, mask, torch.float32)
            logits = logits + self.alpha * torch.matmul(pooled, weights[1].t())
        return logits

    def inputs(self, inner: dict[str, Spec]) -> dict[str, Spec]:
        """The tensors of the program that it reads: with alpha 0 the embedding alone."""
        names = ("hidden_states", "encoder_hidden_states", *MASKS) if self.alpha else ()
        return {name: inner[name] for name in (*names, "temb") if name in inner}

    def outputs(self) -> dict[str, Spec]:
        """Its logits."""
        return {LOGITS: Spec(torch.float32, ("batch", self.router.tokens.out_features))}


def placed_blocks(model: Any, kind: str) -> Iterator[tuple[str, nn.Module, str | None]]:
    """(weight prefix, block, name of its group) for every block of the model's list `kind`.

    Blocks that are left out for good are not among them.
    """
    for index, block in enumerate(getattr(model, kind)):
        name = f"{kind}.{index}"
        if isinstance(block, BlockGroup):
            for member, inner in block.blocks.items():
                yield f"{name}.blocks.{member}.", inner, name
        elif not isinstance(block, SkippedBlock):
            yield f"{name}.", block, None
