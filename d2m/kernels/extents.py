"""Sizes that follow from the number of tokens, as text that needs none of our code to work out.

A grid or a scratch shape of a plan depends on T through three counts, of which every size is a
fixed multiple, or on nothing. As "6*tiles" or 3072 they travel in a manifest, and one set of
cubins serves every T. The texts are fitted to plans made for several T, not written beside them: a
plan that stops being of this form fails to package.
"""

from __future__ import annotations

from collections.abc import Sequence

from d2m.kernels.configs import Tiles
from d2m.kernels.plan import Sizes, ceil_div, tiles_bound

Extent = int | str


def counts(sizes: Sizes, tiles: Tiles) -> dict[str, int]:
    """T tokens; blocks of BLOCK_T tokens; tiles, the bound on row tiles.

    The rule for a reader: blocks = ceil(T / block_t), pairs = T * top_k,
    tiles = (pairs + min(experts, pairs) * (block_m - 1)) // block_m.
    """
    return {
        "T": sizes.tokens,
        "blocks": ceil_div(sizes.tokens, tiles.block_t),
        "tiles": tiles_bound(sizes, tiles.m),
    }


def fit(values: Sequence[int], cases: Sequence[dict[str, int]]) -> Extent:
    """The number, or "f*name", that gives `values` in all `cases`; ValueError where there is none.

    values[i] was read off a plan whose counts are cases[i].
    """
    if len(set(values)) == 1:
        return values[0]
    for name in cases[0]:
        factor, rest = divmod(values[0], cases[0][name])
        if rest == 0 and all(factor * case[name] == v for case, v in zip(cases, values)):
            return name if factor == 1 else f"{factor}*{name}"
    raise ValueError(
        f"a plan's sizes {list(values)} are no fixed multiple of one of {list(cases)}; expected"
        " that of every size, or the manifest's form has to grow."
    )
