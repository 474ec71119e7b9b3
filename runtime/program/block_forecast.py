"""The block forecast of a whole generation before its first step: what routers of alpha 0 choose.

Such routers read the global embedding alone: time, guidance and pooled text, all of them known
before the first step. Executors then run none of them between blocks, and `d2m inspect
--schedule` shows the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.bundle.block_groups import choosing_groups, first_calls

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
    types, steps = component["types"], []
    for feed, kappa in zip(feeds, kappas, strict=True):
        starts: dict[str, np.ndarray] = {}
        groups = choosing_groups(component, kappa)
        router_inputs = {name for _, group in groups for name in types[group["type"]]["inputs"]}
        env = embedding(component, block, feed, router_inputs)
        for name, group in groups:
            inputs = {tensor: env[tensor] for tensor in types[group["type"]]["inputs"]}
            (logits,) = block(group["type"], group["prefix"], inputs).values()
            starts[name] = first_calls(logits, kappa or 0)
        steps.append(starts)
    return steps


def embedding(
    component: Mapping[str, Any], block: Block, feed: Arrays, wanted: set[str]
) -> dict[str, np.ndarray]:
    """The program's tensors `wanted`, from the first calls that write them."""
    env: dict[str, np.ndarray] = dict(feed)
    written: set[str] = set()
    for call in component["program"]:
        if wanted <= written:
            break
        kind = component["types"][call["type"]]
        inputs = {name: env[name] for name in kind["inputs"]}
        env |= block(call["type"], call["prefix"], inputs)
        written.update(kind["outputs"])
    return env
