"""Counting parameters, total and activated, from names and shapes alone.

Shape letters: D width, E experts, H expert hidden, S shared hidden, K chosen.

What is counted: every parameter of the transformer; buffers (the neuron permutation) are not. A
token activates everything but the E - K experts of each sparse FFN it was not sent to, so per FFN
(derived, paper.md):

    activated = (2 D^2 + 2 D) + K (D^2 / 2 + D / 4) + 12 D
                shared expert   K experts             gate

with S = D, H = D/4, E = 12, for an FFN of 4 D without gates but with biases. The shared expert's
2 D are its hidden and its output bias, an expert's D / 4 its hidden biases: the FFN's only output
bias is the shared expert's. The share of the dense FFN that works is stated for the matrices alone,
(2 D^2 + K D^2 / 2) / 8 D^2 = 37.5 % at K = 2, exactly; with biases and gates counted it is a little
more. A gated FFN has the same share: its first matrices have two rows a neuron, all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

BUFFERS = ("neurons", "pos_embed")  # last parts of names that are buffers, not parameters
# Of a group of blocks, `LIST.3.blocks.1....`: 3 is the group's place, 1 the block's in it.
MEMBER = re.compile(r"(\w+\.\d+)\.blocks\.(\d+)\.")
SITE = ".experts.w1"  # what every sparse FFN has, and nothing else
EXPERTS = (".experts.w1", ".experts.b1", ".experts.w2")  # leading dimension: experts
MATRICES = (".shared.fc1.weight", ".shared.fc2.weight", ".experts.w1", ".experts.w2")


def count(
    shapes: Mapping[str, Sequence[int]], top_k: int | None = None, kappa: int | None = None
) -> dict[str, Any]:
    """Parameter counts of a transformer, dense or sparse, from its state dict's shapes.

    Args:
        shapes: parameter name -> shape, as in a checkpoint's header.
        top_k: experts a token uses, 0..E; needed where the model has experts, ignored otherwise.
        kappa: blocks that a group keeps; None: all of them. Blocks of a group are equal in size.

    Returns a dict of integers: `total`, `activated`, `sites` (sparse FFNs), `num_experts`,
    `top_k`, `ffn` and `ffn_activated` (sparse FFNs with biases and gates), `experts` (all routed
    experts), `gates`; and two floats: `ffn_share`, the activated share of the FFNs' matrices
    (exactly .375 for 1S12E2A), and `ffn_share_with_biases`, which counts biases and gates too.
    A dense model has `sites` 0, shares 1 and everything activated. The shares are those of a block
    that runs; `activated` and `ffn_activated` leave out blocks that a group skips.

    Raises:
        ValueError: top_k is missing or not in 0..E.
    """
    sizes, used = _sizes(shapes, top_k)
    total, activated = sum(sizes.values()), sum(used.values()) - _skipped(used, kappa)
    sites = [name.removesuffix(SITE) for name in sizes if name.endswith(SITE)]
    result: dict[str, Any] = {"total": total, "activated": activated, "sites": len(sites)}
    result |= {"num_experts": 0, "top_k": None, "ffn": 0, "ffn_activated": 0, "experts": 0}
    result |= {"gates": 0, "ffn_share": 1.0, "ffn_share_with_biases": 1.0}
    if not sites:
        return result

    num_experts = shapes[sites[0] + SITE][0]
    if top_k is None or not 0 <= top_k <= num_experts:
        raise ValueError(
            f"top_k is {top_k}, but every FFN of this model has {num_experts} experts; "
            f"give a number from 0 to {num_experts}."
        )
    inside = [name for name in sizes if name.startswith(tuple(f"{site}." for site in sites))]
    of_ffns = {name: used[name] for name in inside}
    ffn, working = sum(sizes[name] for name in inside), sum(of_ffns.values())
    # With k = 0 the gate is not evaluated either, yet it is counted: one number per term.
    gates = sum(sizes[name] for name in inside if ".gate." in name)
    matrices = [name for name in inside if name.endswith(MATRICES)]
    return result | {
        "num_experts": num_experts,
        "top_k": top_k,
        "ffn": ffn,
        "ffn_activated": working - _skipped(of_ffns, kappa),
        "experts": sum(sizes[name] for name in inside if name.endswith(EXPERTS)),
        "gates": gates,
        "ffn_share": sum(used[name] for name in matrices) / sum(sizes[name] for name in matrices),
        "ffn_share_with_biases": working / (ffn - gates),
    }


def totals(
    shapes: Mapping[str, Sequence[int]], top_k: int | None = None, kappa: int | None = None
) -> dict[str, int]:
    """`total` and `activated` alone, of any component; top_k None: all experts are used."""
    sizes, used = _sizes(shapes, top_k)
    return {"total": sum(sizes.values()), "activated": sum(used.values()) - _skipped(used, kappa)}


def _sizes(
    shapes: Mapping[str, Sequence[int]], top_k: int | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters of every tensor, and what is left of them when top_k of the experts are used."""
    sizes = {
        name: prod(shape)
        for name, shape in shapes.items()
        if name.rsplit(".", 1)[-1] not in BUFFERS
    }
    used = dict(sizes)
    if top_k is not None:
        # Experts are stacked along E and equal in size, so this division leaves no remainder.
        for name in sizes:
            if name.endswith(EXPERTS) and shapes[name] and shapes[name][0]:
                used[name] = sizes[name] // shapes[name][0] * top_k
    return sizes, used


def _skipped(sizes: Mapping[str, int], kappa: int | None) -> int:
    """Parameters in the blocks that groups skip: names such as `LIST.3.blocks.4.attn...`."""
    groups: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        if found := MEMBER.match(name):
            members = groups.setdefault(found[1], {})
            members[found[2]] = members.get(found[2], 0) + size
    skipped = 0
    for members in groups.values():
        left_out = 0 if kappa is None else max(0, len(members) - kappa)
        skipped += sum(members.values()) // len(members) * left_out
    return skipped


def modulation(shapes: Mapping[str, Sequence[int]]) -> dict[str, str | int | None]:
    """How blocks are modulated: mode full, single or lowrank, and the rank of lowrank.

    In full every norm has a matrix, in single a table beside one shared matrix, in lowrank a
    Linear(rank, .) behind a shared Linear(D, rank), which is no wider than D.
    """
    shared = shapes.get("modulation.linear.weight")
    if shared is None:
        return {"mode": "full", "rank": None}
    if any(name.endswith(".table") for name in shapes):
        return {"mode": "single", "rank": None}
    return {"mode": "lowrank", "rank": min(shared, default=0)}


def block_count(names: Iterable[str], group: str) -> int:
    """How many blocks a transformer has in a module list, those inside groups each for itself."""
    start = f"{group}."
    found = set()
    for name in names:
        if name.startswith(start):
            member = MEMBER.match(name)
            place = name.split(".")[1]
            if member:
                found.add((place, member[2]))
            elif ".router." not in name:
                found.add((place, ""))
    return len(found)
