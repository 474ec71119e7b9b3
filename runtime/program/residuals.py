"""What ControlNets add to a transformer's blocks: residuals, and the places where they are added.

A ControlNet answers each step with tensors [B, T, D]. They are added to the image's tokens behind
blocks of the transformer, as diffusers adds them. No graph of a block knows of it: between two
calls of the program stands a call of the type ADD, whose graph and plan a ControlNet's bundle
brings along. So bundles and plans are the same with and without ControlNets, and any bundle takes
one. (On a device an addition moves three tensors, 75 MB at FLUX.1's size: 20 of a block's 1,600
microseconds on an H200, computed.)

Places are the dense model's. Where a block does not run, because its group chose others, because
its step is cached or because it was left out for good, the residual is added all the same: the
ControlNet's residual tells of the image's outline, not of what the block would have done. (Of a
cached step the estimate holds the residuals already.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runtime.bundle.block_groups import blocks_of
from runtime.bundle.control_record import ADD, residual_name

TENSOR = "hidden_states"  # what blocks hand on in every family

Added = Mapping[int, Sequence[str]]  # call of the program -> residuals that are added behind it
Rule = Callable[[int, int], Sequence[int | None]]  # (blocks, residuals) -> each block's residual


class Adder(Protocol):
    """A ControlNet's executor, beside runtime.program.executor.Executor."""

    component: Mapping[str, Any]

    def values(self, inputs: Mapping[str, Any], slot: int = 0) -> dict[str, Any]:
        """As a call, but outputs stay where the backend has them.

        Of a later call with the same `slot` they may be replaced.
        """

    def add(self, inputs: list[Any]) -> list[Any]:
        """One call of ADD on such values; plans are launched by the transformer's executor."""


@dataclass(frozen=True)
class Residuals:
    """Residuals of one step: names by place, values by name as the backend has them."""

    added: Added
    values: Mapping[str, Any]
    adder: Adder

    def calls(self, call: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """`call` of runtime.program.executor.run_program, with those of ADD made by the adder."""

        def made(index: int, kind: str, key: str, prefix: str, inputs: list[Any]) -> list[Any]:
            if kind == ADD:
                return self.adder.add(inputs)
            return call(index, kind, key, prefix, inputs)

        return made


def dense_places(component: Mapping[str, Any]) -> dict[str, dict[int, int]]:
    """List of blocks in the model -> index in the dense model's list -> call of the program.

    A group's members keep their index: transformer_blocks.4.blocks.5 is block 5.
    """
    found: dict[str, dict[int, int]] = {}
    for call in blocks_of(component):
        stem, *rest = component["program"][call]["prefix"].split(".")
        index = [int(part) for part in rest if part.isdecimal()][-1]
        found.setdefault(stem, {})[index] = call
    return found


def added_at(component: Mapping[str, Any], counts: Mapping[str, int], rule: Rule) -> Added:
    """Where a ControlNet with `counts` residuals for each list of blocks has them added.

    Residuals are named as `residual_name` does. A place whose block was left out for good is behind
    the block before it. ValueError (a clause) where the transformer has no such list of blocks.
    """
    places = dense_places(component)
    added: dict[int, list[str]] = {}
    for stem, count in counts.items():
        if not count:
            continue
        if stem not in places:
            raise ValueError(f"it controls {stem}, but the transformer has {', '.join(places)}")
        calls = places[stem]
        behind = min(calls.values()) - 1
        depth = component.get("depths", {}).get(stem, max(calls) + 1)
        for index, which in enumerate(rule(depth, count)):
            behind = calls.get(index, behind)
            if which is not None:
                added.setdefault(behind, []).append(residual_name(stem, which))
    return added
