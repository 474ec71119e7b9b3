"""Families of diffusion transformers: which there are, and where a model's blocks keep their FFNs.

A family is a row (d2m/family.py) in a file of its own; supporting another model is another row,
not another branch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.family import Family, Site
from d2m.family_flux import FLUX
from d2m.family_pixart import PIXART
from d2m.family_qwen import QWEN
from d2m.family_sd3 import SD3
from d2m.recipe import SparseSpec
from runtime.files.checked_json import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["FAMILIES", "FLUX", "PIXART", "QWEN", "SD3", "Family", "Site"]

FAMILIES = (FLUX, SD3, PIXART, QWEN)


def _known() -> str:
    return ", ".join(f"{' or '.join(f.pipelines)} ({f.title})" for f in FAMILIES)


def family_of(source: str | os.PathLike[str] | Mapping[str, Any]) -> Family:
    """The family of a pipeline directory, or of a model_index.json or transformer config dict.

    Raises FileNotFoundError if the directory or its model_index.json is missing, ValueError if it
    is no pipeline or of a class that is not known; the sentence says which are.
    """
    if isinstance(source, Mapping):
        return _by_class(str(source.get("_class_name")), "this config")
    index = Path(source) / "model_index.json"
    if not index.is_file():
        what = "has no model_index.json" if Path(source).is_dir() else "is no directory"
        raise FileNotFoundError(
            f"{source} {what}; expected a diffusers pipeline directory, as save_pretrained writes."
        )
    name = read_json(index).get("_class_name")
    if not isinstance(name, str):
        raise ValueError(
            f"{index} is not a diffusers pipeline index; expected JSON with a _class_name."
        )
    return _by_class(name, str(source))


def _by_class(name: str, what: str) -> Family:
    for family in FAMILIES:
        if name in (*family.pipelines, family.dense_class, family.sparse_class, *family.aliases):
            return family
    raise ValueError(f"{what} is of class {name}, which d2m does not know; known are {_known()}.")


def family_of_model(model: nn.Module) -> Family:
    """The family of a transformer in memory, by its class or a base class of it."""
    for cls in type(model).__mro__:
        for family in FAMILIES:
            if cls.__name__ in (family.dense_class, family.sparse_class):
                return family
    return _by_class(type(model).__name__, "this model")


def family_of_pipeline(pipe: Any) -> Family:
    """The family of a pipeline in memory, by its class or a base class of it."""
    for cls in type(pipe).__mro__:
        for family in FAMILIES:
            if cls.__name__ in family.pipelines:
                return family
    return _by_class(type(pipe).__name__, "this pipeline")


def sites_of(names: Iterable[str], family: Family) -> list[tuple[str, str, Site]]:
    """(site name, block name, site) of every FFN, in the model's order.

    `names` are parameter names of the model, dense or sparse (a checkpoint's keys will do), but
    without groups of blocks. A site's name is that of its SparseFFN:
    `transformer_blocks.0.ff_context`. Blocks without the module of a site have none there.
    """
    names = list(names)
    modules = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
    found = []
    for blocks in dict.fromkeys(site.blocks for site in family.sites):
        depth = blocks.count(".") + 1
        inside = (name.split(".") for name in names if name.startswith(blocks + "."))
        for index in sorted({int(parts[depth]) for parts in inside}):
            block = f"{blocks}.{index}"
            mine = [site for site in family.sites if site.blocks == blocks]
            placed = [(f"{block}.{site.module}", block, site) for site in mine]
            found += [each for each in placed if each[0] in modules]
    return found


def spec_at(spec: SparseSpec, name: str, family: Family) -> SparseSpec:
    """The structure of the FFNs in a block, given its name or that of a module in it."""
    kinds = {blocks: kind for kind, blocks in family.kinds}
    blocks, index = name.split(".")[:2]
    return spec.at(kinds[blocks], int(index))


def hidden_sizes(dim: int, neurons: int, spec: SparseSpec) -> tuple[int, int]:
    """(S, H) for an FFN of width D with N hidden neurons.

    ValueError unless both are whole and S + E * H = N: no neuron may be lost.
    """
    shared, expert = dim * spec.shared_ratio, dim * spec.expert_ratio
    whole = shared == int(shared) and expert == int(expert)
    if not whole or int(shared) + spec.num_experts * int(expert) != neurons:
        raise ValueError(
            f"shared_ratio {spec.shared_ratio:g} and {spec.num_experts} experts of expert_ratio "
            f"{spec.expert_ratio:g} do not make up the FFN's {neurons} neurons at width {dim}; "
            f"expected shared_ratio + num_experts * expert_ratio = {neurons / dim:g}, with whole "
            "hidden sizes."
        )
    return int(shared), int(expert)


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
