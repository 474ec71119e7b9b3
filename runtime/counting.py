"""What a transformer holds and what a token uses of it, counted from names and shapes of weights.

Blocks in a group are named `LIST.3.blocks.1....`: 3 is the group's place, 1 the block's in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from runtime.files.tensors import Tensor

BUFFERS = ("neurons", "pos_embed")  # stored with the weights, but no parameters
EXPERT_TENSORS = ("experts.w1", "experts.b1", "experts.w2")  # leading dimension: experts
MEMBER = re.compile(r"(\w+\.\d+)\.blocks\.(\d+)\.")


def parameters(
    tensors: Mapping[str, Tensor], top_k: int | None = None, kappa: int | None = None
) -> dict[str, int]:
    """Parameters in all, and those that one token uses with `top_k` experts.

    `kappa`: blocks of each group that run, None for all of them. The blocks of a group are alike.
    """
    total = activated = 0
    groups: dict[str, dict[str, int]] = {}
    for name, tensor in tensors.items():
        if name.rsplit(".", 1)[-1] in BUFFERS:
            continue
        total += tensor.size
        used = tensor.size
        if top_k is not None and name.endswith(EXPERT_TENSORS) and tensor.shape[0]:
            used = top_k * (tensor.size // tensor.shape[0])
        activated += used
        if member := MEMBER.match(name):
            blocks = groups.setdefault(member[1], {})
            blocks[member[2]] = blocks.get(member[2], 0) + used
    for blocks in groups.values():
        skipped = 0 if kappa is None else max(0, len(blocks) - kappa)
        activated -= sum(blocks.values()) // len(blocks) * skipped
    return {"total": total, "activated": activated}


def modulation(tensors: Mapping[str, Tensor]) -> dict[str, str | int | None]:
    """How blocks are modulated: mode full, single or lowrank, and the rank of lowrank.

    In full every norm has a matrix, in single a table beside one shared matrix, in lowrank a
    Linear(rank, .) behind a shared Linear(D, rank), which is no wider than D.
    """
    shared = tensors.get("modulation.linear.weight")
    if shared is None:
        return {"mode": "full", "rank": None}
    if any(name.endswith(".table") for name in tensors):
        return {"mode": "single", "rank": None}
    return {"mode": "lowrank", "rank": min(shared.shape, default=0)}


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
