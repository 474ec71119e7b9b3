"""The recipe of a conversion: how FFNs are split and how the student is distilled, as data.

Torch-free. Read from and written to JSON; presets are JSON files in `presets/`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from d2m.recipe.records import check as _check
from d2m.recipe.records import number as _number
from d2m.recipe.records import record as _record
from d2m.recipe.records import whole as _whole
from d2m.recipe.structure import AdaLN, Blocks, Shares, adaln_from, blocks_from, shares_from
from runtime.files.checked_json import read_json

if TYPE_CHECKING:
    from torch import Tensor

# What a conversion gets besides its recipe: (step, batch size) -> a batch; (phase, done, total).
Batches = Callable[[int, int], Mapping[str, "Tensor"]]
Progress = Callable[[str, int, int], None]
# What a stage may train. The first three are parts of SparseFFN; adaln: every block's modulation;
# groups: all of the blocks in groups; router: the groups' routers; blocks: all of every block.
PARTS = ("shared", "experts", "gate", "adaln", "groups", "router", "blocks")
LOSSES = ("output", "feature", "balance", "group", "group_balance")
SPLITS = ("taylor", "magnitude", "random")
EXPERTS = ("rank", "coactivation")  # which neurons share an expert
ROUTERS = ("random", "energy")  # how gates begin
PRECISIONS = ("float32", "bfloat16")
# What ratios count in: quarters of a dense FFN's hidden neurons. In the paper's models, whose FFNs
# are four times as wide as the model, that is the width.
WHOLE = 4


@dataclass(frozen=True)
class SparseSpec:
    """The structure of every sparse FFN: 1S12E2A by default (read: shared 1, 12 x .25, top 2).

    Ratios are quarters of the dense FFN's hidden neurons, so that 1S12E2A is a quarter shared and
    twelve sixteenths routed however wide the FFN is. shares: see `Shares`; `at` gives the structure
    of one block.
    """

    num_experts: int = 12
    shared_ratio: float = 1.0
    expert_ratio: float = 0.25
    top_k: int = 2
    renormalise: bool = False
    shares: Shares = field(default_factory=Shares)

    def at(self, kind: str, index: int) -> SparseSpec:
        """The structure in one block, "double" or "single", counted in the dense model's list."""
        found = self.shares.of(kind)
        if not found:
            return dataclasses.replace(self, shares=Shares())
        whole = self.shared_ratio + self.num_experts * self.expert_ratio
        return dataclasses.replace(
            self,
            shares=Shares(),
            shared_ratio=found[index],
            expert_ratio=(whole - found[index]) / self.num_experts,
        )


def hidden_sizes(neurons: int, spec: SparseSpec) -> tuple[int, int]:
    """(S, H) for an FFN with N hidden neurons.

    ValueError unless both are whole and S + E * H = N: no neuron may be lost.
    """
    shared, expert = (neurons * ratio / WHOLE for ratio in (spec.shared_ratio, spec.expert_ratio))
    whole = shared == int(shared) and expert == int(expert)
    if not whole or int(shared) + spec.num_experts * int(expert) != neurons:
        raise ValueError(
            f"shared_ratio {spec.shared_ratio:g} and {spec.num_experts} experts of expert_ratio "
            f"{spec.expert_ratio:g} do not make up the FFN's {neurons} neurons; expected "
            f"shared_ratio + num_experts * expert_ratio = {WHOLE}, with whole hidden sizes: ratios "
            f"are quarters of the FFN."
        )
    return int(shared), int(expert)


@dataclass(frozen=True)
class Calibration:
    """How many batches of which size the importance of neurons is measured on (ours)."""

    batches: int = 8
    batch_size: int = 32


@dataclass(frozen=True)
class Local:
    """How every sparse FFN learns by itself from the dense one's inputs (ours).

    steps: of AdamW for each FFN, of `tokens` tokens each, at the rate `lr`; samples: how many run
    through the teacher, `batch_size` at a time; rows: inputs of an FFN that are kept, of all
    samples together; balance: weight of the load balance loss.
    """

    steps: int = 300
    tokens: int = 2048
    samples: int = 64
    batch_size: int = 4
    rows: int = 65536
    lr: float = 1e-3
    balance: float = 0.01


@dataclass(frozen=True)
class Stage:
    """One stage of distillation.

    train: which of `PARTS` learn, everything else is frozen; top_k: experts a token uses meanwhile;
    losses: weight of each of `LOSSES`, those left out are not computed. warmup: share of the steps
    in which the rate rises; clip: largest gradient norm, 0 for none; ema: decay of the weights'
    moving average, which is what the stage leaves behind, 0 for none. kappa: blocks of each group
    that run meanwhile, None for all of them. skip: the stage is left out of this run.
    """

    name: str
    train: tuple[str, ...]
    top_k: int
    steps: int
    lr: float
    losses: Mapping[str, float]
    batch_size: int = 32
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    kappa: int | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", MappingProxyType(dict(self.losses)))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy cannot be pickled or copied
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return partial(Stage, **{**values, "losses": dict(self.losses)}), ()


@dataclass(frozen=True)
class Recipe:
    """All settings of a conversion, but for the directories.

    t_mean, t_std: noise levels of training and calibration, t = sigmoid(N(mean, std)), t = 1 is
    pure noise. precision: what the forward passes run in; weights are float32 throughout.
    renormalise: gates of the chosen experts sum to the same for every token (a baseline; the
    paper's are not renormalised). local: see `Local`; None: FFNs learn together, in stages.
    split: the score by which neurons are shared, and dealt to the experts by "rank" as in the
    paper; experts "coactivation" and router "energy": see `d2m.convert.experts_fit` (ours).
    """

    name: str
    num_experts: int = 12
    shared_ratio: float = 1.0
    expert_ratio: float = 0.25
    top_k: int = 2
    split: str = "taylor"
    experts: str = "rank"
    router: str = "random"
    calibration: Calibration = field(default_factory=Calibration)
    stages: tuple[Stage, ...] = ()
    seed: int = 0
    t_mean: float = 1.2
    t_std: float = 1.2
    precision: str = "float32"
    blocks: Blocks = field(default_factory=Blocks)
    adaln: AdaLN = field(default_factory=AdaLN)
    renormalise: bool = False
    shares: Shares = field(default_factory=Shares)
    local: Local | None = None

    @property
    def spec(self) -> SparseSpec:
        """The part of the recipe that is structure."""
        fields = dataclasses.fields(SparseSpec)
        return SparseSpec(**{each.name: getattr(self, each.name) for each in fields})

    @property
    def steps(self) -> int:
        """Training steps of all stages that are run."""
        return sum(stage.steps for stage in self.stages if not stage.skip)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values; `from_dict` is its inverse."""
    plain = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    plain["calibration"] = dataclasses.asdict(recipe.calibration)
    plain |= {"blocks": recipe.blocks.to_dict(), "adaln": dataclasses.asdict(recipe.adaln)}
    if plain.pop("shares"):
        plain["shares"] = recipe.shares.to_dict()
    for name in ("experts", "router"):  # as files of earlier versions, where it is the paper's way
        if plain[name] == Recipe.__dataclass_fields__[name].default:
            del plain[name]
    del plain["local"]
    if recipe.local is not None:
        plain["local"] = dataclasses.asdict(recipe.local)
    plain["stages"] = [
        {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage)}
        | {"train": list(stage.train), "losses": dict(stage.losses)}
        for stage in recipe.stages
    ]
    return plain


def from_dict(obj: Any, source: str = "recipe") -> Recipe:
    """Check and build a recipe; ValueError in one sentence, beginning with `source`, otherwise."""
    values = _record(Recipe, obj, source)
    values["calibration"] = Calibration(
        **_record(Calibration, values.get("calibration", {}), f"{source}: calibration")
    )
    values["blocks"] = blocks_from(values.get("blocks", {}), f"{source}: blocks")
    shares = values.get("shares", {})
    values["shares"] = shares_from(shares, values["blocks"], f"{source}: shares")
    if (local := values.get("local")) is not None:
        values["local"] = Local(**_record(Local, local, f"{source}: local"))
    values["adaln"] = adaln_from(values.get("adaln", {}), f"{source}: adaln")
    stages = []
    for index, entry in enumerate(values.get("stages", ())):
        place = f"{source}: stages[{index}]"
        stage = _record(Stage, entry, place)
        for key, known in (("train", PARTS), ("losses", LOSSES)):
            for name in stage[key]:
                if name not in known:
                    raise ValueError(f"{place}: {key} has {name!r}; known are {', '.join(known)}.")
        for name, weight in stage["losses"].items():
            _check(_number(weight) and weight >= 0, f"{place}: losses.{name}", weight, "at least 0")
        stage["train"] = tuple(stage["train"])
        stages.append(Stage(**stage))
    recipe = Recipe(**{**values, "stages": tuple(stages)})
    _check_ranges(recipe, source)
    return recipe


def load(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe file. FileNotFoundError or ValueError, in one sentence, if that fails."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"recipe {path} is no file; give a JSON file such as a converted model's recipe.json."
        )
    return from_dict(read_json(path, "recipe"), f"recipe {path}")


def presets() -> list[str]:
    """Names of the presets that come with d2m."""
    return sorted(path.stem for path in (Path(__file__).parent / "presets").glob("*.json"))


def preset(name: str) -> Recipe:
    """A preset by name; ValueError names the known ones otherwise."""
    if name not in presets():
        raise ValueError(
            f"preset {name!r} is not known; expected one of {', '.join(presets())}, or give a "
            "recipe file."
        )
    return load(Path(__file__).parent / "presets" / f"{name}.json")


def with_steps(recipe: Recipe, total: int) -> Recipe:
    """The recipe with `total` steps over its stages, in the recipe's proportion.

    Rounded so that the sum is exact; the last stage takes what is left. Skipped stages take their
    share too, so that a stage on its own is as long as it is among the others.
    """
    _check(_whole(total) and total >= 1, "steps", total, "a whole number from 1 (or --init-only)")
    every = sum(stage.steps for stage in recipe.stages)
    if every == 0:
        raise ValueError(f"recipe {recipe.name!r} has no training steps to share {total} among.")
    stages, before, given = [], 0, 0
    for stage in recipe.stages:
        before += stage.steps
        until = round(total * before / every)
        stages.append(dataclasses.replace(stage, steps=until - given))
        given = until
    return dataclasses.replace(recipe, stages=tuple(stages))


def with_stages(recipe: Recipe, chosen: Sequence[int | str]) -> Recipe:
    """The recipe with all stages skipped but the chosen ones: numbers from 1, or names.

    ValueError names what is no stage of the recipe.
    """
    names = [stage.name for stage in recipe.stages]
    kept = set()
    for each in chosen:
        number = names.index(each) + 1 if each in names else each
        number = int(number) if isinstance(number, str) and number.isdecimal() else number
        if not isinstance(number, int) or not 1 <= number <= len(names):
            known = ", ".join(f"{i} ({name})" for i, name in enumerate(names, 1)) or "none"
            raise ValueError(f"stage {each!r} is not in recipe {recipe.name!r}; it has {known}.")
        kept.add(number)
    stages = [
        dataclasses.replace(stage, skip=number not in kept)
        for number, stage in enumerate(recipe.stages, 1)
    ]
    return dataclasses.replace(recipe, stages=tuple(stages))


def with_local(recipe: Recipe, *, steps: int | None, samples: int | None) -> Recipe:
    """The recipe for FFNs that learn by themselves: its own `local`, or the defaults; no stages.

    steps: of each FFN; samples: that run through the teacher; None leaves them as they are.
    """
    given = {"steps": steps, "samples": samples}
    local = dataclasses.replace(
        recipe.local or Local(), **{name: each for name, each in given.items() if each is not None}
    )
    found = dataclasses.replace(recipe, local=local, stages=())
    _check_ranges(found, "recipe")
    return found


def changed(
    recipe: Recipe,
    *,
    steps: int | None = None,
    stages: Sequence[int | str] = (),
    init_only: bool = False,
    seed: int | None = None,
    precision: str | None = None,
    ema: float | None = None,
) -> Recipe:
    """The recipe with what one run has otherwise; None and () leave it as it is.

    steps, stages: as `with_steps` and `with_stages`, in that order. A stage takes the same steps
    and data on its own as among the others. init_only: split the FFNs and train nothing. ema: of
    every stage. ValueError for values that cannot be, or that contradict one another.
    """
    for name, value in (("steps", steps), ("stages", list(stages) or None)):
        if init_only and value is not None:
            raise ValueError(
                f"{name} is {value} but init_only trains nothing; give one of the two."
            )
    _check(precision in (None, *PRECISIONS), "precision", precision, " or ".join(PRECISIONS))
    fine = ema is None or 0 <= ema < 1
    _check(fine, "ema", ema, "0 (none) or a decay under 1, such as 0.999")
    values: dict[str, Any] = {"seed": seed, "precision": precision}
    recipe = dataclasses.replace(recipe, **{k: v for k, v in values.items() if v is not None})
    if init_only:
        return dataclasses.replace(recipe, stages=())
    recipe = recipe if steps is None else with_steps(recipe, steps)
    recipe = with_stages(recipe, stages) if stages else recipe
    if ema is None:
        return recipe
    averaged = tuple(dataclasses.replace(stage, ema=ema) for stage in recipe.stages)
    return dataclasses.replace(recipe, stages=averaged)


# ---------------------------------------------------------------- validation


def _check_ranges(recipe: Recipe, source: str) -> None:
    def check(fine: bool, key: str, value: Any, expected: str) -> None:
        _check(fine, f"{source}: {key}", value, expected)

    experts = recipe.num_experts
    check(experts >= 1, "num_experts", experts, "at least 1")
    check(recipe.shared_ratio > 0, "shared_ratio", recipe.shared_ratio, "a number over 0")
    check(recipe.expert_ratio > 0, "expert_ratio", recipe.expert_ratio, "a number over 0")
    check(0 <= recipe.top_k <= experts, "top_k", recipe.top_k, f"0 to {experts}")
    check(recipe.split in SPLITS, "split", recipe.split, "one of " + ", ".join(SPLITS))
    check(recipe.experts in EXPERTS, "experts", recipe.experts, " or ".join(EXPERTS))
    check(recipe.router in ROUTERS, "router", recipe.router, " or ".join(ROUTERS))
    check(recipe.precision in PRECISIONS, "precision", recipe.precision, " or ".join(PRECISIONS))
    check(recipe.t_std > 0, "t_std", recipe.t_std, "a number over 0")
    check(recipe.calibration.batches >= 1, "calibration.batches", recipe.calibration.batches, "1+")
    size = recipe.calibration.batch_size
    check(size >= 1, "calibration.batch_size", size, "at least 1")
    if recipe.local is not None:
        for key in ("steps", "tokens", "samples", "batch_size", "rows"):
            value = getattr(recipe.local, key)
            check(value >= (0 if key == "steps" else 1), f"local.{key}", value, "at least 1")
        check(recipe.local.lr > 0, "local.lr", recipe.local.lr, "a number over 0")
        check(recipe.local.balance >= 0, "local.balance", recipe.local.balance, "at least 0")
    for index, stage in enumerate(recipe.stages):
        place = f"stages[{index}]."
        check(bool(stage.train), place + "train", list(stage.train), "one of " + ", ".join(PARTS))
        check(0 <= stage.top_k <= experts, place + "top_k", stage.top_k, f"0 to {experts}")
        check(stage.steps >= 0, place + "steps", stage.steps, "at least 0")
        check(stage.batch_size >= 1, place + "batch_size", stage.batch_size, "at least 1")
        check(stage.lr > 0, place + "lr", stage.lr, "a number over 0")
        check(bool(stage.losses), place + "losses", {}, "at least one of " + ", ".join(LOSSES))
        check(0 <= stage.warmup <= 1, place + "warmup", stage.warmup, "0 to 1")
        check(0 <= stage.ema < 1, place + "ema", stage.ema, "0 up to, not including, 1")
        check(stage.clip >= 0, place + "clip", stage.clip, "at least 0")
        check(stage.weight_decay >= 0, place + "weight_decay", stage.weight_decay, "at least 0")
        if stage.kappa is not None:
            _check_kappa(recipe, stage.kappa, f"{source}: {place}kappa")
        largest = max((len(g) for g in (*recipe.blocks.double, *recipe.blocks.single)), default=0)
        for name in ("group", "group_balance"):
            fine = name not in stage.losses or (stage.kappa or largest) < largest
            check(fine, place + "kappa", stage.kappa, f"one that skips blocks, for the loss {name}")
        fine = "balance" not in stage.losses or stage.top_k > 0
        check(fine, place + "top_k", stage.top_k, "at least 1 for the loss balance")


def _check_kappa(recipe: Recipe, kappa: int, place: str) -> None:
    """A stage's kappa must be one that every group of the recipe can keep."""
    groups = (*recipe.blocks.double, *recipe.blocks.single)
    smallest = min((len(group) for group in groups), default=0)
    words = f"1 to {smallest}" if groups else "null, since the recipe has no groups"
    _check(1 <= kappa <= smallest, place, kappa, words)
