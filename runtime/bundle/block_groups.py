"""Mixture of Blocks in a program: which calls of a group run, and for which samples of a batch.

A component's `groups` name consecutive calls of its program, each group with a router: a block type
that writes a logit per call, [B, m] in float32. kappa neighbours with the largest mean logit run,
the lowest place on ties (as d2m.model.block_group). Samples of a batch choose for themselves: a
call runs once, with the rows of those that chose it, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from runtime.files.checked_json import mapping, number, one_of, text, wrong

BLOCK = re.compile(r"\w+\.\d+\.")  # the weight prefix of a block, not of the model's ends

Starts = Mapping[str, np.ndarray]  # group -> first call that runs, [B], counted in the group
Runs = Mapping[int, np.ndarray]  # call -> the rows that run it; a call that is not here runs all


def blocks_of(component: Mapping[str, Any]) -> list[int]:
    """The places of a program's blocks, which are all of its calls but the model's ends."""
    return [i for i, call in enumerate(component["program"]) if BLOCK.match(call["prefix"])]


def groups_of(component: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """A component's groups in the order in which they run."""
    groups = component.get("groups", {})
    return sorted(groups.items(), key=lambda item: item[1]["calls"][0])


def choosing_groups(
    component: Mapping[str, Any], kappa: int | None
) -> list[tuple[str, Mapping[str, Any]]]:
    """The groups that choose: with kappa = m, or None, all of a group's calls run."""
    return [
        (name, group)
        for name, group in groups_of(component)
        if kappa is not None and kappa < len(group["calls"])
    ]


def largest_kappa(component: Mapping[str, Any]) -> int:
    """The largest kappa that every group can take; 0 without groups."""
    return min((len(group["calls"]) for _, group in groups_of(component)), default=0)


def can_forecast(component: Mapping[str, Any]) -> bool:
    """Whether all routers read the global embedding alone, which no step waits for."""
    groups = groups_of(component)
    return bool(groups) and all(group["alpha"] == 0 for _, group in groups)


def first_calls(logits: np.ndarray, kappa: int) -> np.ndarray:
    """[B, m] -> the first of the kappa neighbours with the largest mean logit, [B]."""
    starts: np.ndarray = windows(logits, kappa).argmax(-1)
    return starts


def windows(logits: np.ndarray, kappa: int) -> np.ndarray:
    """The mean logit of every window of kappa neighbours: [B, m] -> [B, m - kappa + 1]."""
    means: np.ndarray = np.lib.stride_tricks.sliding_window_view(logits, kappa, axis=-1).mean(-1)
    return means


def runs_of(group: Mapping[str, Any], starts: np.ndarray, kappa: int) -> dict[int, np.ndarray]:
    """Which samples run each of a group's calls; calls that all of them run are left out."""
    runs = {}
    for offset, call in enumerate(group["calls"]):
        chosen = (starts <= offset) & (offset < starts + kappa)
        if not chosen.all():
            runs[call] = np.flatnonzero(chosen)
    return runs


def rows_by_call(
    component: Mapping[str, Any], starts: Starts, kappa: int | None
) -> dict[int, np.ndarray]:
    """`runs_of` every group that has chosen so far."""
    runs: dict[int, np.ndarray] = {}
    for name, group in choosing_groups(component, kappa):
        if kappa is not None and name in starts:
            runs |= runs_of(group, starts[name], kappa)
    return runs


def sections(
    component: Mapping[str, Any], kappa: int | None, starts: Starts, cuts: Iterable[int] = ()
) -> Iterator[tuple[int, int, str | None]]:
    """The program cut before every group that chooses and is not in `starts`: (begin, end, group).

    At `cuts`, and last, there are ends of sections without a group; where a group begins at a cut,
    an empty section of that group follows.
    """
    begin, waiting = 0, sorted(cuts)
    for name, group in choosing_groups(component, kappa):
        if name not in starts:
            first = group["calls"][0]
            while waiting and waiting[0] <= first:
                yield begin, waiting[0], None
                begin = waiting.pop(0)
            yield begin, first, name
            begin = first
    for cut in waiting:
        yield begin, cut, None
        begin = cut
    yield begin, len(component["program"]), None


def per_sample(component: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor of the program has a row per sample: all do but inputs that say otherwise.

    (The rotary tables are of tokens, whatever the batch.)
    """
    row = component["inputs"].get(name)
    return row is None or row["shape"][:1] == ["batch"]


def check_groups(row: Mapping[str, Any], where: str) -> None:
    """Raise ValueError (a clause) unless a component's groups are such as its program can run."""
    groups, program = mapping(dict(row), "groups", where), row["program"]
    taken: set[int] = set()
    known = set(row["inputs"])
    before = []  # what is written before each call
    for call in program:
        before.append(set(known))
        known.update(row["types"][call["type"]]["outputs"])
    for name in groups:
        here = f"{where}.groups.{name}"
        group = mapping(groups, name, f"{where}.groups")
        kind = row["types"][one_of(group, "type", tuple(row["types"]), here)]
        text(group, "prefix", here)
        number(group, "alpha", 0, 1, here)
        calls = group.get("calls")
        if not isinstance(calls, list) or not all(type(call) is int for call in calls):
            raise wrong(f"{here}.calls", calls, "a list of places in the program")
        if len(calls) < 2 or calls != list(range(calls[0], calls[0] + len(calls))):
            raise wrong(f"{here}.calls", calls, "two or more neighbours such as [2, 3, 4]")
        if calls[0] < 0 or calls[-1] >= len(program):
            raise wrong(f"{here}.calls", calls, f"places from 0 to {len(program) - 1}")
        if twice := sorted(taken.intersection(calls)):
            raise wrong(f"{here}.calls", calls, f"calls of no other group; {twice} is in two")
        taken.update(calls)
        if set(kind["graphs"]) != {""} or len(kind["outputs"]) != 1:
            raise wrong(f"{here}.type", group["type"], "a type of one graph and one output")
        ready = before[calls[0]]
        if not ready.issuperset(kind["inputs"]):
            raise wrong(f"{here}.type", group["type"], "a type that reads what is known by then")
        for call in calls:
            if not ready.issuperset(row["types"][program[call]["type"]]["outputs"]):
                raise wrong(f"{here}.calls", calls, "blocks that replace what is known by then")


def check_kappa(manifest: Mapping[str, Any]) -> None:
    """Bundles with groups name a default number of blocks that every group can keep."""
    sizes = [largest_kappa(row) for row in manifest["components"].values() if groups_of(row)]
    kappa = manifest.get("kappa")
    if not sizes:
        if kappa is not None:
            raise wrong("kappa", kappa, "null in a bundle without groups of blocks")
    elif type(kappa) is not int or not 1 <= kappa <= min(sizes):
        raise wrong("kappa", kappa, f"a whole number from 1 to {min(sizes)}")
