"""Where a model's blocks keep their FFNs: sites by name, and their weights.

`names` and `get` are of a model in memory or of a checkpoint, dense or sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from d2m.families.family import Family
from d2m.families.site import Site, up_rows
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
            found += [
                (f"{block}.{site.module}", block, site)
                for site in own
                if modules & {f"{block}.{site.module}", f"{block}.{site.fc1}"}
            ]
    return found


def spec_at(spec: SparseSpec, name: str, family: Family) -> SparseSpec:
    """The structure of the FFNs in a block, given its name or that of a module in it."""
    kinds = {blocks: kind for kind, blocks in family.blocks.kinds}
    blocks, index = name.split(".")[:2]
    return spec.at(kinds[blocks], int(index))


class DenseFFN(NamedTuple):
    """A dense FFN's tensors: fc1_w [N, D], fc1_b [N], fc2_w [D, N], fc2_b [D].

    A gated one's fc1 has 2 N rows, those of the gates first. Biases are None where it has none.
    """

    fc1_w: Tensor
    fc1_b: Tensor | None
    fc2_w: Tensor
    fc2_b: Tensor | None

    @property
    def width(self) -> int:
        """D."""
        return int(self.fc1_w.shape[1])

    def to(self, *how: Any) -> DenseFFN:
        """The same on another device or in another dtype, as Tensor.to has them."""
        return DenseFFN(*(None if each is None else each.to(*how) for each in self))

    @property
    def neurons(self) -> int:
        """N."""
        return int(self.fc2_w.shape[1])


def neurons_at(site: Site, rows: int, columns: int) -> int:
    """N of a site whose fc1 has so many rows and whose fc2 so many columns.

    Where both map attention too, its A columns in fc2 and its 3 A rows in fc1 fall away.
    """
    if site.before:
        return (3 * columns - rows) // (3 - up_rows(site.activation))
    return rows if site.gate else rows // up_rows(site.activation)


def read_ffn(get: Callable[[str], Tensor], block: str, site: Site) -> DenseFFN:
    """The dense FFN at a site.

    `get` maps a name to a tensor (`state.__getitem__`, `model.get_parameter`), KeyError or
    AttributeError where there is none. What is a part of a larger weight is a view of it.
    """
    fc1, fc2 = f"{block}.{site.fc1}", f"{block}.{site.fc2}"
    weight, bias, columns = get(f"{fc1}.weight"), _bias(get, fc1), get(f"{fc2}.weight")
    neurons = neurons_at(site, weight.shape[0], columns.shape[1])
    if site.gate:
        import torch

        gate = f"{block}.{site.gate}"
        weight = torch.cat([get(f"{gate}.weight"), weight])
        bias = None if bias is None else torch.cat([get(f"{gate}.bias"), bias])
    own = slice(-neurons * up_rows(site.activation), None)
    return DenseFFN(
        weight[own], None if bias is None else bias[own], columns[:, -neurons:], _bias(get, fc2)
    )


def _bias(get: Callable[[str], Tensor], linear: str) -> Tensor | None:
    try:
        return get(f"{linear}.bias")
    except (KeyError, AttributeError):
        return None


def read_rest(get: Callable[[str], Tensor], block: str, site: Site) -> dict[str, Tensor]:
    """What the site's dense Linears hold beside the FFN, by the sparse model's local name; views.

    The columns of fc2's weight and the rows of fc1's that are the attention's, where there are any.
    """
    fc1, fc2 = f"{block}.{site.fc1}", f"{block}.{site.fc2}"
    found: dict[str, Tensor] = {}
    if site.rest or site.before:
        weight, columns = get(f"{fc1}.weight"), get(f"{fc2}.weight")
        neurons = neurons_at(site, weight.shape[0], columns.shape[1])
        if site.rest:
            found[f"{site.rest}.weight"] = columns[:, :-neurons]
        if site.before:
            own = neurons * up_rows(site.activation)
            found[f"{site.before}.weight"] = weight[:-own]
            if (bias := _bias(get, fc1)) is not None:
                found[f"{site.before}.bias"] = bias[:-own]
    return found
