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
from d2m.families.site import GATED, Site
from d2m.model.grouping import renamed
from d2m.recipe.structure import blocks_from
from d2m.shards import Shards

# Modules whose Linear is modulation; the last is Chroma's approximator of all of it.
MODULATED = ("norm", "_mod", "adaln_single", "distilled_guidance_layer")
KINDS = ("attention", "modulation", "shared", "routed", "dense", "other", "nowhere")


@dataclass(frozen=True)
class Part:
    """Rows and columns (None: all) of a dense Linear's weight, and how they lie in a tensor.

    kind: one of KINDS; tensor: its name, None where the model has no place for them; region: the
    part of the tensor that they are, of which the whole has a place for gates and one for values.
    """

    kind: str
    tensor: str | None
    rows: Tensor | None = None
    columns: Tensor | None = None
    arrange: Callable[[Tensor], Tensor] = lambda change: change
    region: tuple[slice, ...] = ()


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
        if site.blocks != pieces[0] or inside not in site.linears:
            continue
        if neurons := place(f"{block}.{site.module}.neurons"):
            ffn = neurons.removesuffix(".neurons")
            order = shards.read([neurons])[neurons]
            experts, hidden, dim = shards.shapes[f"{ffn}.experts.w2"]
            first = inside != site.fc2
            beside = site.before if first else site.rest
            weight = place(f"{block}.{beside}.weight") if beside else None
            # Rows or columns that are not the FFN's stand before its own.
            before = shards.shapes[weight][0 if first else 1] if weight else 0
            every = {"rows" if first else "columns": torch.arange(before)}
            rest = (Part("attention", weight, **every),) if weight else ()
            if not first:
                return (*rest, *_second(ffn, before + order, experts, hidden, dim))
            found = list(rest)
            for start, half in halves(site, inside):
                own = before + start * len(order) + order
                found += _first(ffn, own, experts, hidden, dim, half)
            return tuple(found)
    tensor = place(f"{linear}.weight")
    return (Part(_kind(pieces, inside, family) if tensor else "nowhere", tensor),)


def halves(site: Site, linear: str) -> tuple[tuple[int, int | None], ...]:
    """Where rows of an up-projection stand in units of N, and the half of the sparse tensors that
    they are: 0 gates, 1 values, None of an FFN without gates."""
    if site.activation not in GATED:
        return ((0, None),)
    if site.gate:
        return ((0, 0 if linear == site.gate else 1),)
    return ((0, 0), (1, 1))


def _first(
    ffn: str, order: Tensor, experts: int, hidden: int, dim: int, half: int | None
) -> tuple[Part, ...]:
    """fc1 [N, D]: rows of the shared expert [S, D], and of the experts [E, D, H].

    half: of a gated FFN, 0 for the gates' rows, 1 for the values': of tensors twice as large.
    """
    head, tail = order[: -experts * hidden], order[-experts * hidden :]

    def arrange(change: Tensor) -> Tensor:
        return change.view(experts, hidden, dim).transpose(1, 2)

    def at(size: int) -> slice:
        return slice(None) if half is None else slice(half * size, (half + 1) * size)

    every = slice(None)
    return (
        Part("shared", f"{ffn}.shared.fc1.weight", rows=head, region=(at(len(head)),)),
        Part(
            "routed",
            f"{ffn}.experts.w1",
            rows=tail,
            arrange=arrange,
            region=(every, every, at(hidden)),
        ),
    )


def _second(ffn: str, order: Tensor, experts: int, hidden: int, dim: int) -> tuple[Part, ...]:
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
    if inside in {each for site in family.blocks.sites for each in site.linears}:
        return "dense"
    if any(piece.startswith(("attn", "attention")) for piece in pieces):
        return "attention"
    above = pieces[-2] if len(pieces) > 1 else ""
    return "modulation" if any(part in above for part in MODULATED) else "other"
