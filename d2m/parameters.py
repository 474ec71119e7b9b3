"""Counting parameters, total and activated, from names and shapes alone (no torch needed).

Shape letters: D width, E experts, H expert hidden (D/4), S shared hidden (D), K chosen.

What is counted: every parameter of the transformer; buffers (the neuron permutation) are not. A
token activates everything but the E - K experts of each sparse FFN it was not sent to, so per FFN
(derived, paper.md):

    activated = (2 D^2 + 2 D) + K (D^2 / 2 + D / 4) + 12 D
                shared expert   K experts             gate

with S = D, H = D/4, E = 12. The shared expert's 2 D are its hidden and its output bias, an expert's
D / 4 its hidden biases: the FFN's only output bias is the shared expert's. The share of the dense
FFN that works is stated for the matrices alone, (2 D^2 + K D^2 / 2) / 8 D^2 = 37.5 % at K = 2,
exactly; with biases and gates counted it is a little more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BUFFERS = ("neurons", "pos_embed")  # last parts of names that are buffers, not parameters
MEMBER = re.compile(r"(\w+\.\d+)\.blocks\.(\d+)\.")  # of a group of blocks
SITE = ".experts.w1"  # what every sparse FFN has, and nothing else
SHARED_MATRICES = ("shared.fc1.weight", "shared.fc2.weight")
EXPERT_MATRICES = ("experts.w1", "experts.w2")


def count(
    shapes: Mapping[str, Sequence[int]], top_k: int | None = None, kappa: int | None = None
) -> dict[str, Any]:
    """Parameter counts of a transformer, dense or sparse, from its state dict's shapes.

    Args:
        shapes: parameter name -> shape, as in a checkpoint's header or `shapes_of(model)`.
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
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    for name in [name for name in sizes if name.rsplit(".", 1)[-1] in BUFFERS]:
        del sizes[name]
    total = sum(sizes.values())
    sites = [name.removesuffix(SITE) for name in sizes if name.endswith(SITE)]
    result: dict[str, Any] = {"total": total, "activated": total, "sites": len(sites)}
    result |= {"num_experts": 0, "top_k": None, "ffn": 0, "ffn_activated": 0, "experts": 0}
    result |= {"gates": 0, "ffn_share": 1.0, "ffn_share_with_biases": 1.0}
    if not sites:
        return result | {"activated": total - _skipped(sizes, kappa)}

    num_experts = shapes[sites[0] + SITE][0]
    if top_k is None or not 0 <= top_k <= num_experts:
        raise ValueError(
            f"top_k is {top_k}, but every FFN of this model has {num_experts} experts; "
            f"give a number from 0 to {num_experts}."
        )
    ffn = experts = gates = shared_matrices = expert_matrices = 0
    for site in sites:
        parts = {
            n.removeprefix(site + "."): s for n, s in sizes.items() if n.startswith(site + ".")
        }
        ffn += sum(parts.values())
        experts += sum(size for part, size in parts.items() if part.startswith("experts."))
        gates += sum(size for part, size in parts.items() if part.startswith("gate."))
        shared_matrices += sum(parts[part] for part in SHARED_MATRICES)
        expert_matrices += sum(parts[part] for part in EXPERT_MATRICES)
    # Experts are stacked along E and equal in size, so these divisions leave no remainder.
    # With k = 0 the gate is not evaluated either, yet it is counted: one number per term.
    idle = experts // num_experts * (num_experts - top_k)
    working = shared_matrices + expert_matrices // num_experts * top_k
    used = {  # what is left of experts when K of E are used
        name: size // num_experts * top_k if ".experts." in name else size
        for name, size in sizes.items()
    }
    of_ffns = {n: size for n, size in used.items() if n.startswith(tuple(s + "." for s in sites))}
    return result | {
        "activated": total - idle - _skipped(used, kappa),
        "num_experts": num_experts,
        "top_k": top_k,
        "ffn": ffn,
        "ffn_activated": ffn - idle - _skipped(of_ffns, kappa),
        "experts": experts,
        "gates": gates,
        "ffn_share": working / (shared_matrices + expert_matrices),
        "ffn_share_with_biases": (ffn - idle) / (ffn - gates),
    }


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


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of a torch module (a model on the meta device will do)."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def human(number: int) -> str:
    """A parameter count as people say it: `5.15 B`, `11.4 M`, `812 k`, `96`."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
