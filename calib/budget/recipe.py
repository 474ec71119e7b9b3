"""`d2m convert --budget`: groups of blocks and sizes of shared experts for a share of dense FLOPs.

Beyond the paper (ours). Measured on the dense model (`calib.measure.sensitivity`), chosen by
dynamic programming (`calib.budget.knapsack`), written as an ordinary recipe: nothing after it knows
of the budget.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.budget.costs import STEPS, can_group, check_reach, costs_of, flops_of, resized, shares_of
from calib.budget.knapsack import Piece, choose, pieces
from d2m.convert.dense import dense_family
from d2m.convert.in_memory import CALIBRATION
from d2m.convert.workdir import RECORD, check_free, work_of
from d2m.families import FLUX
from d2m.plan.hub import locate
from d2m.plan.model_config import Subject, subject_of
from d2m.plan.presets import presets_for, recipe_named
from d2m.recipe import recipe as recipes
from d2m.recipe.recipe import Batches, Progress, Recipe, Stage
from d2m.recipe.structure import KINDS, Blocks, Shares
from runtime.files.checked_json import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn


def recipe_for(
    dense: str | os.PathLike[str],
    model: nn.Module,
    batches: Batches,
    scores: Mapping[str, Tensor],
    budget: float,
    base: Recipe,
    *,
    steps: Sequence[float] = STEPS,
    progress: Progress | None = None,
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe for a budget, and facts about it.

    Args:
        dense: the pipeline's directory, which knows the size of its images; model: its
            transformer; batches: (step, size) -> calibration batch.
        scores: importance of its neurons, site -> [N], as the conversion will split them.
        budget: share of the dense model's FLOPs, over 0 and under 1, as `d2m plan` counts them.
        base: everything but groups, dropped blocks and shares; its top_k is what is counted with.
        steps: sizes of a block's experts to choose from, times the base's; (1,) leaves all FFNs as
            they are, so that a model of `base` can be the start of the conversion.

    The recipe keeps kappa 1. Where the choice has groups and `base` trains none, the last stage of
    preset S for this depth is added, or where there is none the base's last, turned to groups;
    where the choice has none, stages that train groups are left out.

    Returns the recipe, called BASE-budget-SHARE, and {budget, smallest, flops_vs_dense, groups,
    shares, predicted_damage}, JSON values. ValueError names the smallest budget if this one is out
    of reach, one sentence too where no size of expert fits the model.
    """
    from calib.measure.sensitivity import sensitivity

    check_budget(budget)
    subject = subject_of(dense)
    options = shares_of(base, subject.family.blocks.hidden(subject.config), steps)
    plain = without_groups(base)
    costs = costs_of(subject, plain, options)
    depth = subject.depth
    least = check_reach(subject, costs, budget)
    specs = [resized(plain, share).spec for share in options]
    longest = max(costs.router, default=1) - 1
    found = sensitivity(
        model, batches, plain, scores, specs, longest, seed=base.seed, progress=progress
    )
    # Damages were measured one at a time; from here on they are taken to add up.
    every = [
        piece
        for kind, _ in subject.family.blocks.kinds
        for piece in pieces(
            kind,
            found.skipped[kind],
            found.ffn[kind],
            costs.block[kind],
            costs.router,
            partial(can_group, subject, kind),
        )
    ]
    # What stands outside the blocks is spent in any case.
    room = budget * costs.dense - costs.fixed
    chosen = choose(depth, every, room)
    made = recipe_of(plain, chosen, options, subject, f"{base.name}-budget-{budget:g}")
    return made, {
        "budget": budget,
        "smallest": least,
        "flops_vs_dense": flops_of(subject, made) / costs.dense,
        "groups": made.blocks.to_dict()["groups"],
        "shares": made.shares.to_dict(),
        "predicted_damage": sum(piece.damage for piece in chosen),
    }


def without_groups(base: Recipe) -> Recipe:
    """The recipe with all blocks, each for itself, and FFNs of one size."""
    return dataclasses.replace(base, blocks=Blocks(alpha=base.blocks.alpha), shares=Shares())


def check_budget(budget: float) -> None:
    """ValueError unless it is a share."""
    if not 0 < budget < 1:
        raise ValueError(
            f"--budget is {budget:g}; expected a share of the dense model's FLOPs over 0 and under "
            "1, such as 0.45."
        )


def recipe_for_pipeline(
    dense: str | os.PathLike[str],
    budget: float,
    base: Recipe,
    batches: Callable[[Any, int], Batches],
    importance: Callable[..., dict[str, Tensor]],
    *,
    steps: Sequence[float] = STEPS,
    progress: Progress | None = None,
) -> tuple[Recipe, dict[str, Any], dict[str, Tensor]]:
    """`recipe_for` a pipeline directory, or hub id, with the calibration data of a conversion.

    batches, importance: as `convert` takes them. Returns the neurons' scores too, so that the
    conversion need not measure them again.
    """
    check_budget(budget)
    path = locate(dense)
    dense_family(path, base)
    subject = subject_of(path)
    options = shares_of(base, subject.family.blocks.hidden(subject.config), steps)
    check_reach(subject, costs_of(subject, without_groups(base), options), budget)

    from d2m.generate import load_pipeline

    pipe = load_pipeline(path, dtype="fp32")
    data = batches(pipe, base.seed + CALIBRATION)
    scores = importance(pipe.transformer, data, base, seed=base.seed, progress=progress)
    recipe, facts = recipe_for(
        path, pipe.transformer, data, scores, budget, base, steps=steps, progress=progress
    )
    return recipe, facts, scores


def for_conversion(
    dense: str | os.PathLike[str],
    out: str | os.PathLike[str],
    budget: float,
    base: Recipe | str | Path,
    batches: Callable[[Any, int], Batches],
    importance: Callable[..., dict[str, Tensor]],
    *,
    seed: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> tuple[Recipe, Callable[..., dict[str, Tensor]], dict[str, Any]]:
    """What `d2m convert --budget` gives to `convert`: a recipe, an importance, facts.

    On a resume the recipe is that of the conversion to `out`, nothing is measured and there are no
    facts. Errors as `convert` and `recipe_for` raise them.
    """
    check_budget(budget)
    if resume and (made := earlier_recipe(out, budget)):
        return made, importance, {}
    check_free(Path(out), work_of(Path(out)), resume)
    base = recipes.changed(recipe_named(base, dense), seed=seed)
    recipe, facts, scores = recipe_for_pipeline(
        dense, budget, base, batches, importance, progress=progress
    )
    return recipe, lambda *args, **options: scores, facts


def summary(facts: Mapping[str, Any]) -> str:
    """What was chosen, in a sentence or two."""
    groups = [f"{k} {row[0]}-{row[-1]}" for k, lists in facts["groups"].items() for row in lists]
    sizes = Counter(each for row in facts["shares"].values() for each in row)
    words = ", ".join(f"{count} blocks of {share:g}" for share, count in sorted(sizes.items()))
    return (
        f"budget {facts['budget']:g} of dense FLOPs: the chosen recipe needs "
        f"{facts['flops_vs_dense']:.4f} (the smallest possible is {facts['smallest']:.4f}). "
        f"Groups that keep one block: {'; '.join(groups) or 'none'}. "
        f"Shared experts, times the width: {words or 'as the base recipe has them'}."
    )


def earlier_recipe(out: str | os.PathLike[str], budget: float) -> Recipe | None:
    """The recipe that an unfinished or finished conversion to `out` has, None for neither.

    ValueError if that was made for another budget.
    """
    out = Path(out)
    finished, work = out / "recipe.json", work_of(out) / RECORD
    if finished.is_file():
        recipe = recipes.load(finished)
    elif work.is_file():
        recipe = recipes.from_dict(read_json(work)["recipe"], str(work))
    else:
        return None
    if not recipe.name.endswith(f"-budget-{budget:g}"):
        raise ValueError(
            f"{out} is converted by the recipe {recipe.name}, which is not one for --budget "
            f"{budget:g}; resume it with the settings that it was started with, or choose "
            "another output directory."
        )
    return recipe


# ---------------------------------------------------------------- the recipe


def recipe_of(
    base: Recipe, chosen: Sequence[Piece], options: Sequence[float], subject: Subject, name: str
) -> Recipe:
    """The chosen pieces as a recipe; see `recipe_for` for its stages."""
    groups: dict[str, list[tuple[int, ...]]] = {kind: [] for kind in KINDS}
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for piece in chosen:  # in order
        shares[piece.kind] += [options[piece.option]] * piece.size
        if piece.size > 1:
            groups[piece.kind].append(tuple(range(piece.first, piece.first + piece.size)))
    alpha = base.blocks.alpha
    blocks = Blocks(tuple(groups["double"]), tuple(groups["single"]), alpha=alpha)
    own = Shares(tuple(shares["double"]), tuple(shares["single"]))
    if {*own.double, *own.single} == {base.shared_ratio}:
        own = Shares()
    stages = stages_for(base, blocks, subject)
    made = dataclasses.replace(base, name=name, blocks=blocks, shares=own, stages=stages)
    return recipes.from_dict(json.loads(json.dumps(recipes.to_dict(made))), f"recipe {name}")


def stages_for(base: Recipe, blocks: Blocks, subject: Subject) -> tuple[Stage, ...]:
    """The base's stages, with one that trains groups where there are any, and none otherwise."""
    if not base.stages:
        return ()
    plain = tuple(stage for stage in base.stages if "router" not in stage.train)
    if not blocks.grouped:
        return plain
    if len(plain) < len(base.stages):
        return base.stages
    presets = presets_for(FLUX, subject.depth)
    known = recipes.load(presets["S"]).stages if "S" in presets else ()
    like = dataclasses.replace(
        plain[-1],
        name="blocks",
        train=("groups", "router"),
        top_k=base.top_k,
        losses={"output": 1.0, "group": 1.0, "group_balance": 0.01},
        kappa=1,
    )
    return (*plain, next((stage for stage in known if "router" in stage.train), like))
