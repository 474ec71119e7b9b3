"""Groups of blocks in a model: put into its block lists, and their names in a state dict.

Structure and values apart, as in surgery: structure runs on the meta device as well.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from d2m.families import Family, family_of_model
from d2m.model.block_group import ROUTER_STD, BlockGroup, Conditions, SkippedBlock, block_groups
from d2m.model.routing import routing_dtype
from d2m.recipe.structure import KINDS, Blocks, check_depth


def group_blocks(model: nn.Module, blocks: Blocks, family: Family | None = None) -> nn.Module:
    """Put BlockGroups into the model's block lists and take dropped blocks out, in place.

    Only structure: the routers are random. ValueError if an index is none of the model's.
    """
    family = family or family_of_model(model)
    lists = {kind: getattr(model, name) for kind, name in family.blocks.kinds}
    depth = dict.fromkeys(KINDS, 0) | {kind: len(each) for kind, each in lists.items()}
    check_depth(blocks, depth)
    family.blocks.check_blocks(blocks, depth)
    for kind, each in lists.items():
        for group in blocks.groups(kind):
            members = {index: each[index] for index in group}
            dim = width_of(model)
            width = family.blocks.temb_width(dim)
            each[group[0]] = BlockGroup(members, dim, blocks.kappa, blocks.alpha, width)
            for index in group[1:]:
                each[index] = SkippedBlock(members[index])
        for index in blocks.dropped(kind):
            each[index] = SkippedBlock(each[index])
    own = family.blocks
    if blocks.grouped and (own.embedder or own.router_reads):
        conditions = Conditions(own.first_tokens)
        conditions.attach(model, own.embedder)
        for name, group in block_groups(model).items():
            group.conditions, group.reads = conditions, own.router_reads
            if vectors := own.vectors:
                place = name.rpartition(".")[0]
                group.vectors = [vectors(model.config, place, i) for i in group.indices]  # type: ignore[arg-type]
    return model


def grouped_state_dict(
    state: Mapping[str, Tensor], blocks: Blocks, family: Family, seed: int = 0
) -> dict[str, Tensor]:
    """A state dict in the dense model's block order -> that of the model with groups.

    `transformer_blocks.4.attn...` becomes `transformer_blocks.3.blocks.4.attn...` in a group that
    begins at 3; dropped blocks fall out; routers are added, random by seed and group alone.
    """
    result: dict[str, Tensor] = {}
    for kind, name in family.blocks.kinds:
        for group in blocks.groups(kind):
            like = state[routers_like(state, f"{name}.{group[0]}")]
            result |= group_router(f"{name}.{group[0]}", len(group), like, family, seed)
    return result | renamed(state, blocks, family)


def routers_like(names: Iterable[str], block: str) -> str:
    """The name of a weight of a block, dense or not, with D rows: a router is made after it."""
    known = set(names)
    ends = ("attn.to_q", "attn.to_out.linear", "attn.to_out", "attention.to_q")
    found = (f"{block}.{end}.weight" for end in ends)
    return next(name for name in found if name in known)


def width_of(model: nn.Module) -> int:
    """D of a transformer in memory."""
    return int(model.inner_dim if hasattr(model, "inner_dim") else model.config.dim)  # type: ignore


def renamed(state: Mapping[str, Tensor], blocks: Blocks, family: Family) -> dict[str, Tensor]:
    """Some or all of a dense model's tensors under their names in the model with groups.

    Those of dropped blocks fall out.
    """
    places: dict[str, str | None] = {}
    for kind, name in family.blocks.kinds:
        places |= {f"{name}.{i}": None for i in blocks.dropped(kind)}
        for group in blocks.groups(kind):
            places |= {f"{name}.{i}": f"{name}.{group[0]}.blocks.{i}" for i in group}
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        parts = key.split(".", 2)
        block = ".".join(parts[:2])
        home = places.get(block, block)
        if home is not None:
            result[".".join([home, *parts[2:]])] = tensor
    return result


def group_router(
    place: str, blocks: int, like: Tensor, family: Family, seed: int
) -> dict[str, Tensor]:
    """A group's router under its full names; `like`: a weight of the model with D rows."""
    dim = like.shape[0]
    weights = router_weights(place, blocks, dim, seed, family.blocks.temb_width(dim))
    return {f"{place}.router.{part}": w.to(routing_dtype(like)) for part, w in weights.items()}


def router_weights(
    name: str, blocks: int, dim: int, seed: int, width: int | None = None
) -> dict[str, Tensor]:
    """The first weights of a group's router, float32, by seed and group name alone.

    width: of temb, D by default.
    """
    digest = hashlib.sha256(f"{seed}/router/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
    shapes = {"tokens.weight": (blocks, 2 * dim), "embedding.weight": (blocks, width or dim)}
    scale = ROUTER_STD * dim**-0.5
    return {part: torch.randn(s, generator=generator) * scale for part, s in shapes.items()}


def dense_name(name: str) -> str:
    """A name in a model with groups -> the dense model's: `a.3.blocks.4.ff` -> `a.4.ff`."""
    return re.sub(r"^(\w+)\.\d+\.blocks\.(\d+)", r"\1.\2", name)
