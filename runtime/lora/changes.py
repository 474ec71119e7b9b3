"""What an adapter adds to a Linear's weight [O, I]: products, of which rows and columns are taken.

    LowRank     scale * up @ down                       LoRA
    Hadamard    scale * (first * second), elementwise   LoHa; both are LowRank
    Kronecker   scale * kron(left, right)               LoKr

All are linear in their strength, so they are added and taken off without the weight itself; DoRA,
which divides by the weight's norm, is not among them. (LoHa and LoKr: read, LyCORIS.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Rows = np.ndarray | None  # places, None: all


@dataclass(frozen=True)
class LowRank:
    """`scale * up @ down`: up [O, R], down [R, I]."""

    up: np.ndarray
    down: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I]."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """The product's inner dimension."""
        return int(self.down.shape[0])

    def part(self, rows: Rows, columns: Rows, dtype: Any) -> np.ndarray:
        """These rows and columns of the change, computed in `dtype`."""
        up = self.up if rows is None else self.up[rows]
        down = self.down if columns is None else self.down[:, columns]
        # The small factor is scaled: another pass over the product would take as long as making it.
        by = np.dtype(dtype).type(self.scale)
        product: np.ndarray = (by * up.astype(dtype, copy=False)) @ down.astype(dtype, copy=False)
        return product

    def scaled(self, by: float) -> LowRank:
        """The change so many times as strong."""
        return replace(self, scale=self.scale * by)

    def take(self, rows: np.ndarray) -> LowRank:
        """The change of a Linear that has these of the rows."""
        return replace(self, up=self.up[rows])

    def transposed(self, rows: Rows, columns: Rows, dtype: Any) -> np.ndarray:
        """The transpose of `part`, contiguous."""
        turned = LowRank(np.ascontiguousarray(self.down.T), self.up.T, self.scale)
        return turned.part(columns, rows, dtype)


@dataclass(frozen=True)
class Hadamard:
    """`scale * first * second`, element by element."""

    first: LowRank
    second: LowRank
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I]."""
        return self.first.shape

    @property
    def rank(self) -> int:
        """The rank that the product can have."""
        return self.first.rank * self.second.rank

    def part(self, rows: Rows, columns: Rows, dtype: Any) -> np.ndarray:
        """See LowRank."""
        product = self.first.part(rows, columns, dtype)
        product *= self.second.part(rows, columns, dtype)
        product *= np.dtype(dtype).type(self.scale)
        return product

    def scaled(self, by: float) -> Hadamard:
        """See LowRank."""
        return replace(self, scale=self.scale * by)

    def take(self, rows: np.ndarray) -> Hadamard:
        """See LowRank."""
        return Hadamard(self.first.take(rows), self.second.take(rows), self.scale)

    def transposed(self, rows: Rows, columns: Rows, dtype: Any) -> np.ndarray:
        """See LowRank."""
        return np.ascontiguousarray(self.part(rows, columns, dtype).T)


@dataclass(frozen=True)
class Kronecker:
    """`scale * kron(left, right)`: left [A, B], right [C, D], together [A C, B D].

    rows: those of the product that the Linear has, None: all.
    """

    left: np.ndarray
    right: np.ndarray
    scale: float
    rows: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I]."""
        outputs = self.left.shape[0] * self.right.shape[0] if self.rows is None else len(self.rows)
        return outputs, self.left.shape[1] * self.right.shape[1]

    @property
    def rank(self) -> int:
        """The rank that the product can have."""
        return min(self.left.shape) * min(self.right.shape)

    def part(self, rows: Rows, columns: Rows, dtype: Any) -> np.ndarray:
        """See LowRank."""
        height, width = self.right.shape
        own = np.arange(self.left.shape[0] * height) if self.rows is None else self.rows
        down = own if rows is None else own[rows]
        across = np.arange(self.shape[1]) if columns is None else columns
        product: np.ndarray = self.left.astype(dtype)[np.ix_(down // height, across // width)]
        product *= self.right.astype(dtype)[np.ix_(down % height, across % width)]
        product *= np.dtype(dtype).type(self.scale)
        return product

    def scaled(self, by: float) -> Kronecker:
        """See LowRank."""
        return replace(self, scale=self.scale * by)

    def take(self, rows: np.ndarray) -> Kronecker:
        """See LowRank."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def transposed(self, rows: Rows, columns: Rows, dtype: Any) -> np.ndarray:
        """See LowRank."""
        return np.ascontiguousarray(self.part(rows, columns, dtype).T)


Change = LowRank | Hadamard | Kronecker
