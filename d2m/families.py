"""Families of diffusion transformers: where the blocks of a diffusers model keep their FFNs.

A family is a row of names; supporting another model is another row, not another branch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.recipe import SparseSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """One FFN of a block type. Paths are relative to the block.

    blocks: the model's list of such blocks; module: where the SparseFFN goes; fc1, fc2: the dense
    Linears; stream: whose tokens pass, "image", "text" or "both".
    rest: set where fc2 also maps something else: its columns before the FFN's go to this Linear
    (without bias) and fc2 is replaced by AttentionPlusFFN; identity: an activation that SparseFFN
    contains already.
    """

    blocks: str
    module: str
    fc1: str
    fc2: str
    stream: str
    rest: str | None = None
    identity: str | None = None


@dataclass(frozen=True)
class Family:
    """What conversion needs to know of a model: class names, FFN sites, and its kinds of blocks.

    kinds: (kind as recipes name it, the model's list of such blocks), in the order they run;
    depths: (kind, the config's field with the number of them).
    """

    name: str
    title: str
    pipelines: tuple[str, ...]
    dense_class: str
    sparse_class: str
    ratio: int  # hidden neurons of a dense FFN over its width
    sites: tuple[Site, ...]
    kinds: tuple[tuple[str, str], ...]
    depths: tuple[tuple[str, str], ...]


FLUX = Family(
    name="flux",
    title="FLUX.1",
    pipelines=("FluxPipeline",),
    dense_class="FluxTransformer2DModel",
    sparse_class="SparseFluxTransformer2DModel",
    ratio=4,
    sites=(
        Site("transformer_blocks", "ff", "ff.net.0.proj", "ff.net.2", "image"),
        Site(
            "transformer_blocks",
            "ff_context",
            "ff_context.net.0.proj",
            "ff_context.net.2",
            "text",
        ),
        Site(
            "single_transformer_blocks",
            "proj_mlp",
            "proj_mlp",
            "proj_out",
            "both",
            rest="proj_out.linear",
            identity="act_mlp",
        ),
    ),
    kinds=(("double", "transformer_blocks"), ("single", "single_transformer_blocks")),
    depths=(("double", "num_layers"), ("single", "num_single_layers")),
)
FAMILIES = (FLUX,)


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
    try:
        config = json.loads(index.read_text("utf-8"))
        name = str(config["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} is not a diffusers pipeline index ({type(error).__name__}: {error}); "
            "expected JSON with a _class_name."
        ) from error
    return _by_class(name, str(source))


def _by_class(name: str, what: str) -> Family:
    for family in FAMILIES:
        if name in (*family.pipelines, family.dense_class, family.sparse_class):
            return family
    raise ValueError(f"{what} is of class {name}, which d2m does not know; known are {_known()}.")


def family_of_model(model: nn.Module) -> Family:
    """The family of a transformer in memory, by its class or a base class of it."""
    for cls in type(model).__mro__:
        for family in FAMILIES:
            if cls.__name__ in (family.dense_class, family.sparse_class):
                return family
    return _by_class(type(model).__name__, "this model")


def sites_of(names: Iterable[str], family: Family) -> list[tuple[str, str, Site]]:
    """(site name, block name, site) of every FFN, in the model's order.

    `names` are parameter names of the model, dense or sparse (a checkpoint's keys will do), but
    without groups of blocks. A site's name is that of its SparseFFN:
    `transformer_blocks.0.ff_context`.
    """
    names = list(names)
    found = []
    for blocks in dict.fromkeys(site.blocks for site in family.sites):
        depth = blocks.count(".") + 1
        inside = (name.split(".") for name in names if name.startswith(blocks + "."))
        for index in sorted({int(parts[depth]) for parts in inside}):
            block = f"{blocks}.{index}"
            found += [(f"{block}.{s.module}", block, s) for s in family.sites if s.blocks == blocks]
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
