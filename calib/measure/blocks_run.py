"""Which blocks of its groups a model runs, by noise level and by kind of prompt.

Shape letters: B batch, m blocks of a group, W windows of kappa neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from d2m.model.block_group import BlockGroup


def blocks_run(logits: Tensor, kappa: int) -> Tensor:
    """Windows' logits [B, W] -> whether a sample runs each block, bool [B, m], m = W + kappa - 1.

    The largest logit's window wins and holds `kappa` neighbours, as in `d2m.model.block_group`.
    """
    first = logits.detach().argmax(-1).cpu()[:, None]
    offsets = torch.arange(logits.shape[-1] + kappa - 1)
    return (offsets >= first) & (offsets < first + kappa)


class Tally:
    """Samples that ran each block of a group, counted apart by bucket and by category."""

    def __init__(self, group: BlockGroup, buckets: int, categories: Sequence[str]):
        self.blocks, self.kappa = group.indices, group.kappa
        self.categories = tuple(categories)
        shape = buckets, max(1, len(self.categories)), len(self.blocks)
        self.runs = torch.zeros(shape, dtype=torch.float64)
        self.samples = torch.zeros(shape[:2], dtype=torch.float64)

    def add(self, logits: Tensor, bucket: int, category: Tensor | None) -> None:
        """One batch. category [B]: each sample's number among the categories; None: one for all."""
        ran = blocks_run(logits, self.kappa).double()
        kinds = torch.zeros(len(ran), dtype=torch.long) if category is None else category.cpu()
        self.runs[bucket].index_add_(0, kinds, ran)
        self.samples[bucket].index_add_(0, kinds, torch.ones(len(ran), dtype=torch.float64))

    def figures(self) -> dict[str, Any]:
        """Shares of the samples that ran each block: {"blocks", "kappa", "all", "buckets",
        "categories"}, each share list with its number of samples, {"samples", "share" [m]}."""
        named = {
            name: _shares(self.runs[:, i].sum(0), self.samples[:, i].sum())
            for i, name in enumerate(self.categories)
        }
        return {
            "blocks": list(self.blocks),
            "kappa": self.kappa,
            "all": _shares(self.runs.sum((0, 1)), self.samples.sum()),
            "buckets": [_shares(r.sum(0), n.sum()) for r, n in zip(self.runs, self.samples)],
            "categories": named,
        }


def tallies(
    groups: Mapping[str, BlockGroup], buckets: int, categories: Sequence[str]
) -> dict[str, Tally]:
    """One for each group that chooses: with kappa = m there is nothing to count."""
    return {
        name: Tally(group, buckets, categories)
        for name, group in groups.items()
        if group.kappa < len(group.blocks)
    }


def _shares(runs: Tensor, samples: Tensor) -> dict[str, Any]:
    share = runs / samples.clamp_min(1)
    return {"samples": int(samples), "share": [round(float(x), 4) for x in share]}
