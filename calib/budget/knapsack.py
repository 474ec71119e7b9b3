"""The cheapest damage within a budget: which blocks share a group, how large each shared expert is.

Torch-free and pure: numbers in, a choice out. What the numbers mean is `calib.budget.recipe`'s
business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

UNITS = 20_000  # steps into which the budget is cut: what rounding can waste is items / UNITS of it


@dataclass(frozen=True)
class Piece:
    """A run of consecutive blocks of one kind that is decided together: `size` 1 is no group.

    option: index of the FFN's size, the same for all blocks of a group. cost: FLOPs that a sample
    spends in it; damage: what it does to the output.
    """

    kind: str
    first: int
    size: int
    option: int
    cost: float
    damage: float


def pieces(
    kind: str,
    skipped: Mapping[tuple[int, int], float],
    ffn: Sequence[Sequence[float]],
    block_cost: Sequence[Sequence[float]],
    router_cost: Mapping[int, float],
    grouped: Callable[[int, int], bool] = lambda first, size: True,
) -> list[Piece]:
    """Every run that a list of blocks can be cut into, kappa being 1.

    skipped: (first, length) -> damage when these blocks are left out; with groups of up to m, all
    runs of 1 to m - 1 blocks. ffn: block -> damage of each size of its FFN. block_cost: the same
    of its cost. router_cost: size of a group -> cost of its router; its keys are the sizes.
    grouped: whether a model can have the group (first, size).

    A group [i, i + m) keeps one block, so it leaves out one of the runs that begin at i and i + 1,
    or two shorter ones; a router that chooses per sample does no worse than always the better of
    the first two, whose measured damage is taken. Its FFNs' damage is their mean: one of them runs.
    It costs what its last block does, as `d2m plan` counts it.
    """
    count, options = len(ffn), range(len(block_cost[0]) if block_cost else 0)
    found = [
        Piece(kind, i, 1, option, block_cost[i][option], ffn[i][option])
        for i in range(count)
        for option in options
    ]
    for size, router in sorted(router_cost.items()):
        for i in range(count - size + 1):
            if not grouped(i, size):
                continue
            least = min(skipped[i, size - 1], skipped[i + 1, size - 1])
            for option in options:
                inside = sum(ffn[j][option] for j in range(i, i + size)) / size
                cost = block_cost[i + size - 1][option] + router
                found.append(Piece(kind, i, size, option, cost, least + inside))
    return found


def smallest(depth: Mapping[str, int], found: Sequence[Piece]) -> float:
    """The least cost of any choice: every list of blocks cut into pieces from end to end."""
    return sum(_best(n, _of(found, kind))[0] for kind, n in depth.items())


def _best(count: int, found: Sequence[Piece]) -> tuple[float, list[Piece]]:
    """The cheapest way through one list."""
    best: list[tuple[float, list[Piece]]] = [(0.0, [])]
    for end in range(1, count + 1):
        ways = [
            (best[p.first][0] + p.cost, [*best[p.first][1], p])
            for p in found
            if p.first + p.size == end
        ]
        best.append(min(ways, key=lambda way: way[0]))
    return best[count]


def choose(
    depth: Mapping[str, int], found: Sequence[Piece], budget: float, units: int = UNITS
) -> list[Piece]:
    """The pieces, in order, that cover all blocks at a cost of at most `budget` with least damage.

    Damages add up. Dynamic programming over costs in `units` steps of the budget, each piece's
    rounded up, so the budget is kept; the damage is at most the least that is possible with
    budget * (1 - blocks / units), the blocks being as many as pieces can be. Equal damage: the
    cheaper, then the earlier piece. ValueError names the smallest budget that can be reached.
    """
    least = smallest(depth, found)
    if least > budget:
        raise ValueError(f"the budget is {budget:g}; expected {least:g} or more.")
    step = budget / units
    damage = np.full(units + 1, np.inf)  # by units spent; the choice behind it in `history`
    damage[0] = 0.0
    history: list[tuple[str, dict[int, np.ndarray]]] = []
    byend: dict[tuple[str, int], list[Piece]] = {}
    for piece in found:
        byend.setdefault((piece.kind, piece.first + piece.size), []).append(piece)
    for kind, count in depth.items():
        rows = {0: damage}
        taken: dict[int, np.ndarray] = {}
        for end in range(1, count + 1):
            row, choice = np.full(units + 1, np.inf), np.full(units + 1, -1, np.int32)
            for index, piece in enumerate(byend.get((kind, end), ())):
                spent = _units(piece.cost, step)
                if spent > units:
                    continue
                before = rows[piece.first][: units + 1 - spent] + piece.damage
                better = before < row[spent:]
                row[spent:][better], choice[spent:][better] = before[better], index
            rows[end], taken[end] = row, choice
        history.append((kind, taken))
        damage = rows[count]
    if not np.isfinite(damage).any():  # possible, but for rounding: the cheapest is all there is
        return [p for kind, n in depth.items() for p in _best(n, _of(found, kind))[1]]
    spent = int(np.argmin(damage))
    result: list[Piece] = []
    for kind, taken in reversed(history):
        end = depth[kind]
        while end:
            piece = byend[kind, end][int(taken[end][spent])]
            result.append(piece)
            spent -= _units(piece.cost, step)
            end = piece.first
    return result[::-1]


def _of(found: Sequence[Piece], kind: str) -> list[Piece]:
    return [piece for piece in found if piece.kind == kind]


def _units(cost: float, step: float) -> int:
    """A cost in steps, rounded up; what is a whole number but for rounding stays one."""
    return int(np.ceil(cost / step - 1e-9))
