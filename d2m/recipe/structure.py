"""What a sparse model does with whole blocks and with modulation, as data: groups, drops, AdaLN.

Torch-free. `double` and `single` are FLUX's two kinds of blocks; indices count from 0 in the dense
model's own list of that kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from d2m.recipe.records import check, check_keys, number, whole

KINDS = ("double", "single")
ADALN_MODES = ("full", "single", "lowrank")
Indices = tuple[int, ...]


@dataclass(frozen=True)
class Blocks:
    """Mixture of Blocks: which consecutive blocks share a router that keeps `kappa` of them (read).

    double, single: groups of block indices. alpha: weight of the tokens against the global
    embedding in the router, 0.5 is ours; with 0 the schedule of a generation is known before its
    first step. drop_double, drop_single: blocks left out for good (depth pruning, a baseline).
    """

    double: tuple[Indices, ...] = ()
    single: tuple[Indices, ...] = ()
    kappa: int = 1
    alpha: float = 0.5
    drop_double: Indices = ()
    drop_single: Indices = ()

    def groups(self, kind: str) -> tuple[Indices, ...]:
        """The groups of one kind, "double" or "single"."""
        return self.double if kind == "double" else self.single

    def dropped(self, kind: str) -> Indices:
        """The blocks of one kind that are left out."""
        return self.drop_double if kind == "double" else self.drop_single

    @property
    def grouped(self) -> bool:
        """Whether there is any group."""
        return bool(self.double or self.single)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `blocks_from` is the inverse. `drop` is there only where blocks are."""
        plain = {
            "groups": {kind: [list(group) for group in self.groups(kind)] for kind in KINDS},
            "kappa": self.kappa,
            "alpha": self.alpha,
        }
        drop = {kind: list(self.dropped(kind)) for kind in KINDS if self.dropped(kind)}
        return plain | ({"drop": drop} if drop else {})


@dataclass(frozen=True)
class AdaLN:
    """How blocks are modulated.

    full: a Linear in every norm, as in the dense model. single: one shared Linear(d, 6d) and a
    learned table per norm (PixArt's; derived: the published counts need it). lowrank: one shared
    Linear(d, rank) and a Linear(rank, 6d or 3d) per norm; rank None takes the largest rank that has
    no more parameters than `single` (ours).
    """

    mode: str = "full"
    rank: int | None = None


@dataclass(frozen=True)
class Shares:
    """Shared experts of unequal size, block by block, in quarters of an FFN (ours).

    Empty: every block has the recipe's `shared_ratio`. What a block's shared expert has less, its
    experts have more, so no neuron is lost. The blocks of a group are alike.
    """

    double: tuple[float, ...] = ()
    single: tuple[float, ...] = ()

    def of(self, kind: str) -> tuple[float, ...]:
        """Those of one kind of blocks, "double" or "single"."""
        return self.double if kind == "double" else self.single

    def __bool__(self) -> bool:
        return bool(self.double or self.single)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `shares_from` is the inverse."""
        return {kind: list(self.of(kind)) for kind in KINDS if self.of(kind)}


def shares_from(obj: Any, blocks: Blocks, place: str = "shares") -> Shares:
    """Check and build `Shares` from JSON values; ValueError in one sentence otherwise."""
    obj = _object(obj, place, KINDS)
    for kind, each in obj.items():
        fine = isinstance(each, list | tuple) and all(number(share) and share > 0 for share in each)
        check(fine, f"{place}.{kind}", each, "a list of numbers over 0, one for every block")
        for group in blocks.groups(kind):
            inside = {each[i] for i in group if i < len(each)}
            words = f"one number for the group {list(group)}"
            check(len(inside) < 2, f"{place}.{kind}", sorted(inside), words)
    return Shares(**{kind: tuple(map(float, each)) for kind, each in obj.items()})


def blocks_from(obj: Any, place: str = "blocks") -> Blocks:
    """Check and build `Blocks` from JSON values; ValueError in one sentence, beginning with place.

    Groups are lists of consecutive rising indices, no block is in two groups or grouped and
    dropped, kappa is no more than the smallest group's size. `check_depth` knows the model.
    """
    obj = _object(obj, place, ("groups", "kappa", "alpha", "drop"))
    groups = _object(obj.get("groups", {}), f"{place}.groups", KINDS)
    drop = _object(obj.get("drop", {}), f"{place}.drop", KINDS)
    kappa, alpha = obj.get("kappa", 1), obj.get("alpha", 0.5)
    check(whole(kappa) and kappa >= 1, f"{place}.kappa", kappa, "a whole number from 1")
    check(number(alpha) and 0 <= alpha <= 1, f"{place}.alpha", alpha, "a number from 0 to 1")
    values: dict[str, Any] = {"kappa": kappa, "alpha": float(alpha)}
    for kind in KINDS:
        where = f"{place}.groups.{kind}"
        lists = groups.get(kind, [])
        check(isinstance(lists, list | tuple), where, lists, "a list of lists of block indices")
        for group in lists:
            rising = _indices(group) and all(b == a + 1 for a, b in zip(group, group[1:]))
            words = "consecutive block indices such as [3, 4, 5]"
            check(bool(rising and len(group) >= 2), where, group, words)
            check(len(group) >= kappa, where, group, f"at least kappa = {kappa} blocks")
        left = drop.get(kind, [])
        check(_indices(left), f"{place}.drop.{kind}", left, "a list of block indices")
        used = [index for group in lists for index in group] + list(left)
        twice = sorted({index for index in used if used.count(index) > 1})
        check(not twice, f"{place}: {kind} block", twice, "every block in one place only")
        values[kind] = tuple(sorted(tuple(group) for group in lists))
        values[f"drop_{kind}"] = tuple(sorted(left))
    return Blocks(**values)


def adaln_from(obj: Any, place: str = "adaln") -> AdaLN:
    """Check and build `AdaLN` from JSON values; ValueError in one sentence otherwise."""
    obj = _object(obj, place, ("mode", "rank"))
    mode, rank = obj.get("mode", "full"), obj.get("rank")
    check(mode in ADALN_MODES, f"{place}.mode", mode, "one of " + ", ".join(ADALN_MODES))
    fine = rank is None or (mode == "lowrank" and whole(rank) and rank >= 1)
    check(fine, f"{place}.rank", rank, "null, or a whole number from 1 with mode lowrank")
    return AdaLN(mode, rank)


def check_depth(blocks: Blocks, depth: Mapping[str, int]) -> None:
    """ValueError unless every index is one of a model with `depth[kind]` blocks of each kind."""
    for kind in KINDS:
        used = [i for group in blocks.groups(kind) for i in group] + list(blocks.dropped(kind))
        if used and max(used) >= depth[kind]:
            raise ValueError(
                f"the recipe's blocks name {kind} block {max(used)}; expected 0 to "
                f"{depth[kind] - 1}, this model's {depth[kind]} {kind} blocks."
            )


def check_shares(shares: Shares, depth: Mapping[str, int]) -> None:
    """ValueError unless there are as many as blocks of each kind, or none."""
    for kind in KINDS:
        if shares.of(kind) and len(shares.of(kind)) != depth[kind]:
            raise ValueError(
                f"the recipe's shares name {len(shares.of(kind))} {kind} blocks; expected "
                f"{depth[kind]}, as many as this model has, or none."
            )


def active_blocks(blocks: Blocks, depth: Mapping[str, int]) -> dict[str, int]:
    """How many blocks of each kind a sample runs in a model of that depth."""
    return {
        kind: depth[kind]
        - len(blocks.dropped(kind))
        - sum(len(group) - blocks.kappa for group in blocks.groups(kind))
        for kind in KINDS
    }


def lowrank_default(dim: int, chunks: int) -> int:
    """The largest rank at which `lowrank` has no more weights than `single` (ours), at least 1.

    `chunks`: modulation vectors of width `dim` over all norms, 12 a double and 3 a single block.
    single has 6 d^2 + 6 d + chunks d, lowrank d r + chunks d r + chunks d.
    """
    return max(1, 6 * (dim + 1) // (chunks + 1))


def _object(obj: Any, place: str, known: Iterable[str]) -> dict[str, Any]:
    check(isinstance(obj, Mapping), place, obj, "an object")
    check_keys(obj, place, known)
    return dict(obj)


def _indices(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(whole(i) and i >= 0 for i in value)
