"""The recipe of a conversion: how FFNs are split and how the student is distilled, as data.

Torch-free. Read from and written to JSON; presets are JSON files in `d2m/presets/`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

PARTS = ("shared", "experts", "gate")  # what a stage may train, named as SparseFFN's submodules
LOSSES = ("output", "feature", "balance")
SPLITS = ("taylor", "magnitude", "random")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class SparseSpec:
    """The structure of every sparse FFN: 1S12E2A by default (read: shared 1, 12 x .25, top 2)."""

    num_experts: int = 12
    shared_ratio: float = 1.0
    expert_ratio: float = 0.25
    top_k: int = 2


@dataclass(frozen=True)
class Calibration:
    """How many batches of which size the importance of neurons is measured on (ours)."""

    batches: int = 8
    batch_size: int = 32


@dataclass(frozen=True)
class Stage:
    """One stage of distillation.

    train: which of `PARTS` learn, everything else is frozen; top_k: experts a token uses meanwhile;
    losses: weight of each of `LOSSES`, those left out are not computed. warmup: share of the steps
    in which the rate rises; clip: largest gradient norm, 0 for none; ema: decay of the weights'
    moving average, which is what the stage leaves behind, 0 for none.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", MappingProxyType(dict(self.losses)))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy cannot be pickled or copied
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _stage, ({**values, "losses": dict(self.losses)},)


def _stage(values: dict[str, Any]) -> Stage:
    return Stage(**values)


@dataclass(frozen=True)
class Recipe:
    """Everything a conversion is told, but for the directories.

    t_mean, t_std: noise levels of training and calibration, t = sigmoid(N(mean, std)), t = 1 is
    pure noise. precision: what the forward passes run in; weights are float32 throughout.
    """

    name: str
    num_experts: int = 12
    shared_ratio: float = 1.0
    expert_ratio: float = 0.25
    top_k: int = 2
    split: str = "taylor"
    calibration: Calibration = field(default_factory=Calibration)
    stages: tuple[Stage, ...] = ()
    seed: int = 0
    t_mean: float = 1.2
    t_std: float = 1.2
    precision: str = "float32"

    @property
    def spec(self) -> SparseSpec:
        """The part of the recipe that is structure."""
        return SparseSpec(self.num_experts, self.shared_ratio, self.expert_ratio, self.top_k)

    @property
    def steps(self) -> int:
        """Training steps of all stages together."""
        return sum(stage.steps for stage in self.stages)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values; `from_dict` is its inverse."""
    plain = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    plain["calibration"] = dataclasses.asdict(recipe.calibration)
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


def load(path: str | Path) -> Recipe:
    """Read a recipe file. FileNotFoundError or ValueError, in one sentence, if that fails."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"recipe {path} is no file; give a JSON file such as a converted model's recipe.json."
        )
    try:
        obj = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"recipe {path} is not valid JSON ({error}).") from error
    return from_dict(obj, f"recipe {path}")


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

    Rounded so that the sum is exact; the last stage takes what is left.
    """
    _check(_whole(total) and total >= 1, "steps", total, "a whole number from 1 (or --init-only)")
    if recipe.steps == 0:
        raise ValueError(f"recipe {recipe.name!r} has no training steps to share {total} among.")
    stages, before, given = [], 0, 0
    for stage in recipe.stages:
        before += stage.steps
        until = round(total * before / recipe.steps)
        stages.append(dataclasses.replace(stage, steps=until - given))
        given = until
    return dataclasses.replace(recipe, stages=tuple(stages))


# ---------------------------------------------------------------- validation


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


_KINDS = {
    "str": (lambda v: isinstance(v, str), "a string"),
    "int": (_whole, "a whole number"),
    "float": (_number, "a number"),
    "tuple[str, ...]": (
        lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
        "a list of strings",
    ),
    "tuple[Stage, ...]": (lambda v: isinstance(v, list), "a list of stages"),
    "Mapping[str, float]": (lambda v: isinstance(v, dict), "an object of loss weights"),
    "Calibration": (lambda v: isinstance(v, dict), "an object"),
}


def _record(cls: type, obj: Any, place: str) -> dict[str, Any]:
    """The fields of `obj` for `cls`: an object with known keys, none missing, each of its type."""
    if not isinstance(obj, dict):
        raise ValueError(f"{place} is {obj!r:.60}; expected a JSON object.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in obj.items():
        if key not in fields:
            raise ValueError(f"{place} has the unknown key {key!r}; known are {', '.join(fields)}.")
        fits, words = _KINDS[str(fields[key].type)]
        _check(fits(value), f"{place}: {key}", value, words)
    for name, f in fields.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and name not in obj:
            raise ValueError(f"{place} has no {name!r}; add it.")
    return dict(obj)


def _check(fine: bool, what: str, value: Any, expected: str) -> None:
    if not fine:
        raise ValueError(f"{what} is {value!r:.60}; expected {expected}.")


def _check_ranges(recipe: Recipe, source: str) -> None:
    def check(fine: bool, key: str, value: Any, expected: str) -> None:
        _check(fine, f"{source}: {key}", value, expected)

    experts = recipe.num_experts
    check(experts >= 1, "num_experts", experts, "at least 1")
    check(recipe.shared_ratio > 0, "shared_ratio", recipe.shared_ratio, "a number over 0")
    check(recipe.expert_ratio > 0, "expert_ratio", recipe.expert_ratio, "a number over 0")
    check(0 <= recipe.top_k <= experts, "top_k", recipe.top_k, f"0 to {experts}")
    check(recipe.split in SPLITS, "split", recipe.split, "one of " + ", ".join(SPLITS))
    check(recipe.precision in PRECISIONS, "precision", recipe.precision, " or ".join(PRECISIONS))
    check(recipe.t_std > 0, "t_std", recipe.t_std, "a number over 0")
    check(recipe.calibration.batches >= 1, "calibration.batches", recipe.calibration.batches, "1+")
    size = recipe.calibration.batch_size
    check(size >= 1, "calibration.batch_size", size, "at least 1")
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
