"""A LoRA file's changes as torch's tensors; what is read, and how, is runtime.lora.file's.

Shape letters: O outputs and I inputs of a Linear, R rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runtime.lora import file
from runtime.lora.changes import Hadamard, Kronecker
from runtime.lora.changes import LowRank as Product


@dataclass(frozen=True)
class LowRank:
    """The change `scale * up @ down` of a weight [O, I]: up [O, R], down [R, I]."""

    up: Tensor
    down: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    def part(self, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
        """These rows and columns (None: all) of the change, computed in `dtype`."""
        up, down = self._factors(rows, columns, dtype)
        return self.scale * (up @ down)

    def squared_norm(self, rows: Tensor | None, columns: Tensor | None) -> float:
        """Their squared Frobenius norm, in float64, without making the product."""
        up, down = self._factors(rows, columns, torch.float64)
        return float(self.scale**2 * ((up.T @ up) * (down @ down.T)).sum())

    def _factors(
        self, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        up = self.up if rows is None else self.up[rows]
        down = self.down if columns is None else self.down[:, columns]
        return up.to(dtype), down.to(dtype)


@dataclass(frozen=True)
class Whole:
    """A change that is no product of two matrices (LoHa, LoKr)."""

    change: Hadamard | Kronecker

    @property
    def rank(self) -> int:
        """The rank that it can have."""
        return self.change.rank

    def part(self, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See LowRank."""
        down, across = (None if each is None else each.numpy() for each in (rows, columns))
        kind = np.float64 if dtype == torch.float64 else np.float32
        return torch.from_numpy(self.change.part(down, across, kind)).to(dtype)

    def squared_norm(self, rows: Tensor | None, columns: Tensor | None) -> float:
        """See LowRank; the product is made."""
        return float(self.part(rows, columns, torch.float64).square().sum())


Change = LowRank | Whole


def read_lora(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Change]:
    """See runtime.lora.file.read_lora."""

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array))

    return {
        name: LowRank(tensor(change.up), tensor(change.down), change.scale)
        if isinstance(change, Product)
        else Whole(change)
        for name, change in file.read_lora(path, shapes).items()
    }
