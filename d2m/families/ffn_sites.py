"""Where a model's blocks keep their FFNs: sites by name, and their weights.

`names` and `get` are of a model in memory or of a checkpoint, dense or sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from d2m.families.family import Family, Site
from d2m.recipe.recipe import SparseSpec

if TYPE_CHECKING:
    from torch import Tensor


def sites_of(names: Iterable[str], family: Family) -> list[tuple[str, str, Site]]:
    """(site name, block name, site) of every FFN, in the model's order.

    `names` are parameter names of the model, dense or sparse (a checkpoint's keys will do), but
    without groups of blocks. A site's name is that of its SparseFFN:
    `transformer_blocks.0.ff_context`. Blocks without the module of a site have none there.
    """
    names = list(names)
    modules = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
    found = []
    for blocks in dict.fromkeys(site.blocks for site in family.blocks.sites):
        depth = blocks.count(".") + 1
        inside = (name.split(".") for name in names if name.startswith(blocks + "."))
        for index in sorted({int(parts[depth]) for parts in inside}):
            block = f"{blocks}.{index}"
            own = (site for site in family.blocks.sites if site.blocks == blocks)
            named = ((f"{block}.{site.module}", block, site) for site in own)
            found += [each for each in named if each[0] in modules]
    return found


def spec_at(spec: SparseSpec, name: str, family: Family) -> SparseSpec:
    """The structure of the FFNs in a block, given its name or that of a module in it."""
    kinds = {blocks: kind for kind, blocks in family.blocks.kinds}
    blocks, index = name.split(".")[:2]
    return spec.at(kinds[blocks], int(index))


def read_ffn(
    get: Callable[[str], Tensor], block: str, site: Site
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dense FFN at a site: fc1 weight [N, D], bias [N], fc2 weight [D, N], bias [D].

    `get` maps a name to a tensor (`state.__getitem__`, `model.get_parameter`). The fc2 weight is a
    view of the dense one where that has more columns than the FFN's N.
    """
    fc1, fc2 = f"{block}.{site.fc1}", f"{block}.{site.fc2}"
    weight = get(f"{fc1}.weight")
    columns = get(f"{fc2}.weight")[:, -weight.shape[0] :]
    return weight, get(f"{fc1}.bias"), columns, get(f"{fc2}.bias")


def read_rest(get: Callable[[str], Tensor], block: str, site: Site) -> Tensor:
    """The columns of fc2's weight that are not the FFN's (the attention's), a view."""
    hidden = get(f"{block}.{site.fc1}.weight").shape[0]
    return get(f"{block}.{site.fc2}.weight")[:, :-hidden]
