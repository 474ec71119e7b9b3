"""The block schedule of a whole generation before its first step: what routers of alpha 0 choose.

Such routers read the global embedding alone: time, guidance and pooled text, all of them known
before anything is drawn. Executors then ask none of them between blocks, and `d2m inspect
--schedule` shows the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.bundle.block_groups import choosing, starts_of

Arrays = Mapping[str, np.ndarray]
Block = Callable[[str, str, Arrays], Mapping[str, np.ndarray]]  # (type, prefix, inputs) -> outputs


def forecast(
    component: Mapping[str, Any],
    block: Block,
    feeds: Iterable[Arrays],
    kappas: Sequence[int | None],
) -> list[dict[str, np.ndarray]]:
    """For every step: group -> first call that runs, [B], counted in the group.

    `feeds` are the component's inputs at each step; `block` runs one block type. All groups must
    have alpha 0; groups that keep all of their calls are left out.
    """
    found = []
    for feed, kappa in zip(feeds, kappas, strict=True):
        starts: dict[str, np.ndarray] = {}
        asked = choosing(component, kappa)
        env = embedding(component, block, feed, {n for _, g in asked for n in reads(component, g)})
        for name, group in asked:
            inputs = {tensor: env[tensor] for tensor in reads(component, group)}
            (logits,) = block(group["type"], group["prefix"], inputs).values()
            starts[name] = starts_of(logits, kappa or 0)
        found.append(starts)
    return found


def reads(component: Mapping[str, Any], group: Mapping[str, Any]) -> list[str]:
    """The tensors that a group's router reads."""
    names: list[str] = component["types"][group["type"]]["inputs"]
    return names


def embedding(
    component: Mapping[str, Any], block: Block, feed: Arrays, wanted: set[str]
) -> dict[str, np.ndarray]:
    """The program's tensors `wanted`, from the first calls that write them."""
    env: dict[str, np.ndarray] = dict(feed)
    have: set[str] = set()
    for call in component["program"]:
        if wanted <= have:
            break
        kind = component["types"][call["type"]]
        inputs = {name: env[name] for name in kind["inputs"]}
        env |= block(call["type"], call["prefix"], inputs)
        have.update(kind["outputs"])
    return env
