"""Where the weight of a dense Linear lies in a sparse model: its rows and columns, by tensor.

Shape letters: D width, N dense hidden neurons, S shared hidden, E experts, H expert hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2m.families import Family
from d2m.model.grouping import renamed
from d2m.recipe.structure import blocks_from
from d2m.shards import Shards

MODULATED = ("norm", "_mod", "adaln_single")  # modules whose Linear is modulation
KINDS = ("attention", "modulation", "shared", "routed", "dense", "other", "nowhere")


@dataclass(frozen=True)
class Part:
    """Rows and columns (None: all) of a dense Linear's weight, and how they lie in a tensor.

    kind: one of KINDS; tensor: its name, None where the model has no place for them.
    """

    kind: str
    tensor: str | None
    rows: Tensor | None = None
    columns: Tensor | None = None
    arrange: Callable[[Tensor], Tensor] = lambda change: change


def dense_linears(config: Mapping[str, Any], family: Family) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every Linear of the dense model that has this config, sparse or not."""
    import diffusers

    cls = getattr(diffusers, family.names.dense_class)
    known = inspect.signature(cls.__init__).parameters
    with torch.device("meta"):
        model = cls(**{name: value for name, value in config.items() if name in known})
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def parts_of(
    linear: str, config: Mapping[str, Any], shards: Shards, family: Family
) -> tuple[Part, ...]:
    """The parts of a dense Linear's weight in the model of `config` and `shards`, dense or sparse.

    Together they are all of its rows and columns, once.
    """
    fields = {key: config.get(key) or {} for key in ("groups", "drop")}
    blocks = blocks_from(fields, "the config's blocks")

    def place(name: str) -> str | None:
        """The model's own name of a dense model's tensor, None if it has none."""
        found = next(iter(renamed({name: torch.empty(0)}, blocks, family)), None)
        return found if found in shards.where else None

    pieces = linear.split(".")
    block, inside = ".".join(pieces[:2]), ".".join(pieces[2:])
    for site in family.blocks.sites:
        if site.blocks != pieces[0] or inside not in (site.fc1, site.fc2):
            continue
        if neurons := place(f"{block}.{site.module}.neurons"):
            ffn = neurons.removesuffix(".neurons")
            order = shards.read([neurons])[neurons]
            sizes = shards.shapes[f"{ffn}.experts.w1"]
            if inside == site.fc1:
                return _first(ffn, order, *sizes)
            weight = place(f"{block}.{site.rest}.weight") if site.rest else None
            before = shards.shapes[weight][1] if weight else 0  # columns that are not the FFN's
            rest = (Part("attention", weight, columns=torch.arange(before)),) if weight else ()
            return (*rest, *_second(ffn, before + order, *sizes))
    tensor = place(f"{linear}.weight")
    return (Part(_kind(pieces, inside, family) if tensor else "nowhere", tensor),)


def _first(ffn: str, order: Tensor, experts: int, dim: int, hidden: int) -> tuple[Part, ...]:
    """fc1 [N, D]: rows of the shared expert [S, D], and of the experts [E, D, H]."""
    head, tail = order[: -experts * hidden], order[-experts * hidden :]

    def arrange(change: Tensor) -> Tensor:
        return change.view(experts, hidden, dim).transpose(1, 2)

    return (
        Part("shared", f"{ffn}.shared.fc1.weight", rows=head),
        Part("routed", f"{ffn}.experts.w1", rows=tail, arrange=arrange),
    )


def _second(ffn: str, order: Tensor, experts: int, dim: int, hidden: int) -> tuple[Part, ...]:
    """fc2 [D, N]: columns of the shared expert [D, S], and of the experts [E, H, D]."""
    head, tail = order[: -experts * hidden], order[-experts * hidden :]

    def arrange(change: Tensor) -> Tensor:
        # Times E: the experts are stored so, for gates of 1/E.
        return change.T.reshape(experts, hidden, dim) * experts

    return (
        Part("shared", f"{ffn}.shared.fc2.weight", columns=head),
        Part("routed", f"{ffn}.experts.w2", columns=tail, arrange=arrange),
    )


def _kind(pieces: list[str], inside: str, family: Family) -> str:
    """What a Linear that lies in the model as in the dense one is counted as."""
    if inside in {each for site in family.blocks.sites for each in (site.fc1, site.fc2)}:
        return "dense"
    if any(piece.startswith("attn") for piece in pieces):
        return "attention"
    above = pieces[-2] if len(pieces) > 1 else ""
    return "modulation" if any(part in above for part in MODULATED) else "other"
