"""The choice under a budget against every possibility, on cases small enough to try them all."""

import itertools

import numpy as np
import pytest

from calib.budget.knapsack import Piece, choose, pieces, smallest

SIZES = (2, 3)


def case(seed: int, depth: dict[str, int], options: int = 3, whole: bool = False) -> list[Piece]:
    """Random damages, costs that fall with the option, other ones for every block.

    whole: the first option does no damage, as an FFN that stays as it is.
    """
    rng = np.random.default_rng(seed)
    found = []
    for kind, count in depth.items():
        skipped = {
            (i, n): float(rng.uniform(0.1, 3) * n)
            for n in range(1, max(SIZES))
            for i in range(count - n + 1)
        }
        ffn = np.sort(rng.uniform(0, 1, (count, options)), axis=1)
        ffn[:, 0] *= not whole
        costs = (-np.sort(-rng.uniform(1, 4, (count, options)), axis=1)).tolist()
        found += pieces(kind, skipped, ffn.tolist(), costs, {size: 0.05 * size for size in SIZES})
    return found


def every(depth: dict[str, int], found: list[Piece]) -> list[list[Piece]]:
    """All ways to cover all blocks."""

    def ways(kind: str, first: int) -> list[list[Piece]]:
        if first == depth[kind]:
            return [[]]
        return [
            [piece, *rest]
            for piece in found
            if piece.kind == kind and piece.first == first
            for rest in ways(kind, first + piece.size)
        ]

    parts = itertools.product(*(ways(kind, 0) for kind in depth))
    return [[piece for part in choice for piece in part] for choice in parts]


def total(choice: list[Piece], what: str) -> float:
    return sum(getattr(piece, what) for piece in choice)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.95])
def test_the_best_of_all_possibilities(seed: int, share: float) -> None:
    depth = {"double": 2, "single": 3}
    found = case(seed, depth)
    possible = every(depth, found)
    costs = [total(choice, "cost") for choice in possible]
    budget = min(costs) + share * (max(costs) - min(costs))
    chosen = choose(depth, found, budget)
    assert total(chosen, "cost") <= budget * (1 + 1e-9)

    def least(limit: float) -> float:
        return min(total(c, "damage") for c, cost in zip(possible, costs) if cost <= limit)

    assert least(budget) <= total(chosen, "damage") + 1e-9
    bound = least(max(min(costs), budget * (1 - 5 / 20_000)))
    assert total(chosen, "damage") <= bound + 1e-9


def test_the_bound_of_coarse_units() -> None:
    depth = {"double": 0, "single": 4}
    found = case(9, depth)
    possible = every(depth, found)
    costs = np.array([total(choice, "cost") for choice in possible])
    damages = np.array([total(choice, "damage") for choice in possible])
    budget, units = float(np.median(costs)), 40
    chosen = choose(depth, found, budget, units)
    assert total(chosen, "cost") <= budget
    assert total(chosen, "damage") <= damages[costs <= budget * (1 - 4 / units)].min() + 1e-9


def test_pieces_cover_every_block_once() -> None:
    depth = {"double": 3, "single": 5}
    chosen = choose(depth, case(1, depth), 12.0)
    for kind, count in depth.items():
        covered = [
            piece.first + i for piece in chosen if piece.kind == kind for i in range(piece.size)
        ]
        assert covered == list(range(count))


def test_room_for_everything_is_the_least_damage() -> None:
    """Identity: with a budget that no choice exceeds nothing is grouped or made smaller."""
    depth = {"double": 3, "single": 5}
    chosen = choose(depth, case(2, depth, whole=True), 1e3)
    assert {(piece.size, piece.option) for piece in chosen} == {(1, 0)}


def test_a_budget_out_of_reach_names_the_smallest() -> None:
    depth = {"double": 2, "single": 3}
    found = case(3, depth)
    least = min(total(choice, "cost") for choice in every(depth, found))
    assert smallest(depth, found) == pytest.approx(least)
    with pytest.raises(ValueError, match=f"the budget is .*; expected {least:g} or more"):
        choose(depth, found, least * 0.99)
    assert total(choose(depth, found, least), "cost") == pytest.approx(least)  # whatever rounding


def test_a_group_takes_the_better_of_its_two_ends() -> None:
    skipped, ffn = {(0, 1): 5.0, (1, 1): 2.0}, [[0.0, 1.0], [0.0, 3.0]]
    found = pieces("single", skipped, ffn, [[7, 5], [2, 1]], {2: 0.1})
    group = {p.option: p for p in found if p.size == 2}
    assert (group[0].damage, group[0].cost) == (2.0, 2.1)
    assert (group[1].damage, group[1].cost) == (4.0, 1.1)
    alone = pieces("single", skipped, ffn, [[7, 5], [2, 1]], {2: 0.1}, lambda first, size: False)
    assert alone == [piece for piece in found if piece.size == 1]
