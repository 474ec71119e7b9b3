"""The rows of the table: models made from the dense teacher, each by a recipe, and knobs of them.

A row with a `start` begins with that row's model of the same seed and trains its last stage alone:
stages 1 and 2 run every block, so the mixtures of blocks share them with L, and so do the models
with dropped blocks that they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from d2m.plan.model_config import subject_of
from d2m.plan.presets import recipe_named
from d2m.recipe import recipe as recipes
from d2m.recipe.recipe import Recipe
from scripts.reproduce import baselines, probe

STEPS = 600  # of stages 1 and 2 together; stage 3 takes as many more, as in the presets
WORLDS = ("shapes", "emoji")


@dataclass(frozen=True)
class Row:
    """One model, or one setting of a model's knobs.

    recipe: from the dense model's directory; None: nothing is trained. start: the row whose model
    training begins with. times: its training steps, as a multiple of the others'. of: the row whose
    model generates, with `knobs`. says: what the row is, for the table.
    """

    name: str
    says: str
    recipe: Callable[[str], Recipe] | None = None
    start: str | None = None
    times: float = 1.0
    of: str | None = None
    knobs: dict[str, int] = field(default_factory=dict, hash=False)

    @property
    def needs(self) -> str | None:
        """The row whose model must be there first."""
        return self.start or self.of


def _preset(name: str) -> Callable[[str], Recipe]:
    return lambda dense: recipe_named(name, dense)


def _from(name: str, change: Callable[..., Recipe], *more: Any) -> Callable[[str], Recipe]:
    return lambda dense: change(_preset(name)(dense), *more)


def _fixed(name: str, way: str) -> Callable[[str], Recipe]:
    """A preset's groups replaced by as many blocks that always run."""

    def made(dense: str) -> Recipe:
        depth = subject_of(Path(dense)).depth
        runs = probe.read_runs(dense) if way == "linear" else {}
        return baselines.depth_pruned(_preset(name)(dense), depth, way, runs)

    return made


def _budget(dense: str) -> Recipe:
    """What `d2m convert --budget 0.411 --init-only --seed 0` chose, with S's stages."""
    found = recipes.load(Path(__file__).with_name("budget-0.411.json"))
    return replace(found, stages=_preset("S")(dense).stages)


def _lean(by: int) -> Callable[[str], Recipe]:
    return _from("L", baselines.leaner, by)


def _together(by: int) -> Callable[[str], Recipe]:
    """`_lean` in one stage, at the rate of its first, as pruned FFNs."""
    return lambda dense: _one_stage(_lean(by)(dense))


def _one_stage(recipe: Recipe) -> Recipe:
    joint = baselines.joint(recipe)
    (stage,) = joint.stages
    return replace(joint, stages=(replace(stage, lr=recipe.stages[0].lr),))


def _at_once(**fields: Any) -> Callable[[str], Recipe]:
    """L in one stage, at the rate of its first; fields of the recipe that are otherwise."""
    return lambda dense: replace(_one_stage(_preset("L")(dense)), **fields)


# FFNs that learn by themselves: long enough that mixtures have passed pruned FFNs
# (results/emoji/ffn-alone.json), on tokens enough that neither learns them by heart.
ALONE = recipes.Local(steps=3200, tokens=1024, samples=2048, batch_size=64, lr=1e-2)
POLISH = 3e-3  # the whole model's rate after that, half of what it has from scratch


def _alone(change: Callable[..., Recipe] | None = None, *more: Any) -> Callable[[str], Recipe]:
    """L, or what it is changed to, every FFN learning by itself."""

    def made(dense: str) -> Recipe:
        found = _preset("L")(dense)
        found = change(found, *more) if change else found
        local = replace(ALONE, balance=ALONE.balance if found.top_k else 0.0)
        return replace(found, name=f"{found.name}-local", local=local, stages=())

    return made


def _polished(change: Callable[..., Recipe] | None = None, *more: Any) -> Callable[[str], Recipe]:
    """The same model's FFNs learning together, from FFNs that have learnt alone."""

    def made(dense: str) -> Recipe:
        found = _preset("L")(dense)
        found = change(found, *more) if change else _one_stage(found)
        (stage,) = found.stages
        return replace(found, stages=(replace(stage, lr=POLISH),))

    return made


def _narrow(by: int) -> Callable[[str], Recipe]:
    """FFNs cut to as many neurons as `_lean` activates: L's 1.5 x the width, over `by`."""
    return lambda dense: baselines.width_pruned(_lean(by)(dense), 1.5 / by)


def _long(name: str, says: str, of: str, times: float, start: str | None = None) -> Row:
    """A row's recipe again, trained longer: whether the others' differences are those of haste."""
    found = next(row for row in _TRAINED if row.name == of)
    return Row(name, says, found.recipe, start=start, times=times)


def _knob(name: str, of: str, says: str, **knobs: int) -> Row:
    return Row(name, says, of=of, knobs=knobs)


_TRAINED = (
    Row("dense", "the teacher"),
    Row("L", "MoE: 1S12E2A in every FFN", _preset("L")),
    Row("S", "and MoB: 11 + 24 of FLUX's blocks, here 4 + 8", _preset("S"), start="L"),
    Row(
        "width-1.5",
        "FFNs cut to the same width as 1S12E2A",
        _from("L", baselines.width_pruned, 1.5),
    ),
    Row(
        "depth-first",
        "S with fixed blocks: the first of every group",
        _fixed("S", "first"),
        start="L",
    ),
    Row(
        "depth-middle",
        "S with fixed blocks: a run from the middle left out",
        _fixed("S", "middle"),
        start="L",
    ),
    Row("random", "L, neurons dealt at random", _from("L", baselines.random_split)),
    Row("width-2", "FFNs cut to 2.0", _from("L", baselines.width_pruned, 2.0)),
    Row("joint", "S, all stages at once", _from("S", baselines.joint)),
    Row("XS", "and MoB: 11 + 16, here 4 + 4", _preset("XS"), start="L"),
    Row("no-stage-1", "L without stage 1", _from("L", baselines.without_stage_one)),
    Row("renormalised", "L, gates that sum to 1", _from("L", baselines.renormalised)),
    Row(
        "S-frozen",
        "S, blocks outside groups frozen in stage 3",
        _from("S", baselines.frozen),
        start="L",
    ),
    Row("budget", "S's FLOPs, groups and experts' sizes by `--budget`", _budget),
    Row(
        "depth-first-joint",
        "depth-first, all stages at once",
        lambda dense: baselines.joint(_fixed("S", "first")(dense)),
    ),
    Row(
        "XS-first",
        "XS with fixed blocks: the first of every group",
        _fixed("XS", "first"),
        start="L",
    ),
    Row("M", "and MoB: 15 + 28, here 4 + 10", _preset("M"), start="L"),
)

# 1,500 steps of stages 1 and 2, 2,600 of stage 3, 4,100 of all at once
LONG, LONG_BLOCKS, LONG_JOINT = 2.5, 13 / 3, 41 / 12

ROWS = (
    *_TRAINED,
    _long("L-long", "L, 2.5 times the steps", "L", LONG),
    _long("depth-first-long", "depth-first, 4.3 times", "depth-first", LONG_BLOCKS, "L-long"),
    _long("S-long", "S, 4.3 times the steps of stage 3", "S", LONG_BLOCKS, "L-long"),
    _long("width-1.5-long", "width-1.5, 2.5 times the steps", "width-1.5", LONG),
    _long("XS-long", "XS, 4.3 times the steps of stage 3", "XS", LONG_BLOCKS, "L-long"),
    _long("XS-first-long", "XS-first, 4.3 times", "XS-first", LONG_BLOCKS, "L-long"),
    Row(
        "XS-joint-long",
        "XS, all stages at once, as many steps as XS-long",
        _from("XS", baselines.joint),
        times=LONG_JOINT,
    ),
    Row("L-quarter", "L's experts 4 times smaller: 1S60E2A", _lean(4)),
    Row("L-quarter-joint", "L-quarter, both stages at once, at width-0.375's rate", _together(4)),
    Row("width-0.375", "FFNs cut to the same width as 1S60E2A", _narrow(4)),
    _knob("L k=0", "L", "no expert but the shared one", top_k=0),
    _knob("L k=1", "L", "one expert a token", top_k=1),
    _knob("L k=4", "L", "four experts a token", top_k=4),
    _knob("L k=12", "L", "all experts", top_k=12),
    _knob("S kappa=2", "S", "two blocks of a group", kappa=2),
    _knob("S kappa=3", "S", "all blocks", kappa=3),
    _knob("S k=1", "S", "one expert a token", top_k=1),
)


LONGER = 20 / 3  # 4,000 steps

# What the emoji world adds: runs of blocks chosen by linear probes, and L in one stage.
_MORE = (
    Row(
        "depth-linear",
        "S with fixed blocks: the run of each kind that a linear map replaces best left out",
        _fixed("S", "linear"),
        start="L",
    ),
    Row(
        "XS-linear",
        "XS with fixed blocks, chosen by linear maps",
        _fixed("XS", "linear"),
        start="L",
    ),
    Row("L-joint", "L, both stages at once, at width-1.5's rate", _at_once()),
    Row(
        "L-fitted",
        "L-joint, experts of neurons that are active together, routers fitted to them",
        _at_once(experts="coactivation", router="energy"),
    ),
    Row("L-joint-longer", "L-joint, 6.7 times the steps", _at_once(), times=LONGER),
    Row(
        "width-1.5-longer",
        "width-1.5, 6.7 times the steps",
        _from("L", baselines.width_pruned, 1.5),
        times=LONGER,
    ),
    Row(
        "width-2-longer",
        "width-2, 6.7 times the steps",
        _from("L", baselines.width_pruned, 2.0),
        times=LONGER,
    ),
    Row("L-local", "every FFN of L learns by itself", _alone()),
    Row("width-1.5-local", "width-1.5, every FFN by itself", _alone(baselines.width_pruned, 1.5)),
    Row("L-polished", "L-local, then FFNs together", _polished(), start="L-local"),
    Row(
        "width-1.5-polished",
        "width-1.5-local, then FFNs together",
        _polished(baselines.width_pruned, 1.5),
        start="width-1.5-local",
    ),
    Row("L-router", "L-joint, routers fitted to experts by rank", _at_once(router="energy")),
)
_EMOJI = (
    "dense L-polished width-1.5-polished L-local width-1.5-local L-joint-longer width-1.5-longer "
    "width-2-longer L-fitted L-joint width-1.5 width-2 L S "
    "depth-first depth-middle depth-linear random joint XS depth-first-joint XS-first XS-linear M "
    "L-router"
).split()

_SAYS = {  # of 6 + 6 blocks
    "M": "and MoB: 15 + 28 of FLUX's blocks, here 6 + 4",
    "S": "and MoB: 11 + 24, here 4 + 4",
    "XS": "and MoB: 11 + 16, here 4 + 2",
}


def rows_of(world: str) -> tuple[Row, ...]:
    """The rows of a world's table; ValueError for an unknown world."""
    if world not in WORLDS:
        raise ValueError(f"--world is {world!r}, expected {' or '.join(WORLDS)}")
    knobs = tuple(row for row in ROWS if row.of)
    if world == "shapes":
        return ROWS
    rows = (*map(named, _EMOJI), *knobs)
    return tuple(replace(row, says=_SAYS.get(row.name, row.says)) for row in rows)


def named(name: str) -> Row:
    """The row of a name; ValueError names the known ones."""
    every = (*ROWS, *_MORE)
    for row in every:
        if row.name == name:
            return row
    raise ValueError(
        f"row {name!r} is not known; expected one of {', '.join(r.name for r in every)}"
    )


def chain(row: Row) -> list[Row]:
    """The row, and before it all that it needs, in the order in which they are made."""
    return [*(chain(named(row.needs)) if row.needs else ()), row]


def recipe_of(row: Row, dense: str, steps: int, seed: int) -> Recipe:
    """The row's recipe and seed; its steps are `steps` and the presets', `times` as many.

    Where FFNs learn by themselves the steps are the recipe's own.
    """
    assert row.recipe is not None, row
    found = row.recipe(dense)
    if found.local is not None:
        return replace(found, seed=seed)
    presets = sum(stage.steps for stage in _preset("L")(dense).stages)
    total = round(found.steps * steps * row.times / presets)
    found = replace(recipes.with_steps(found, total), seed=seed)
    return recipes.with_stages(found, [len(found.stages)]) if row.start else found
