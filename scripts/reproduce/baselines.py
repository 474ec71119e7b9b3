"""What the method is compared with, as recipes made from a recipe: same code, steps and batches.

Torch-free. Each function takes a recipe and returns another with the same training budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from d2m.recipe.recipe import WHOLE, Recipe, Stage, with_steps
from d2m.recipe.structure import KINDS, Blocks, Shares


def random_split(recipe: Recipe) -> Recipe:
    """Neurons dealt to the experts at random in place of by importance."""
    return replace(recipe, name=f"{recipe.name}-random", split="random")


def renormalised(recipe: Recipe) -> Recipe:
    """Gates of the chosen experts made to sum to the same for every token."""
    return replace(recipe, name=f"{recipe.name}-renormalised", renormalise=True)


def without_stage_one(recipe: Recipe) -> Recipe:
    """No training of the shared experts alone; the other stages share its steps."""
    rest = tuple(stage for stage in recipe.stages if stage.top_k > 0)
    if not rest:
        raise ValueError(f"recipe {recipe.name!r} trains shared experts alone; nothing is left.")
    short = replace(recipe, name=f"{recipe.name}-no-stage-1", stages=rest)
    return with_steps(short, recipe.steps)


def joint(recipe: Recipe) -> Recipe:
    """All that the stages train, with all of their losses, in one stage as long as all of them.

    What the stages disagree on is the last one's: it is what images are generated with.
    """
    last = recipe.stages[-1]
    words = dict.fromkeys(word for stage in recipe.stages for word in stage.train)
    losses = {name: weight for stage in recipe.stages for name, weight in stage.losses.items()}
    stage = replace(last, name="joint", train=tuple(words), losses=losses, steps=recipe.steps)
    return replace(recipe, name=f"{recipe.name}-joint", stages=(stage,))


def frozen(recipe: Recipe) -> Recipe:
    """Blocks outside groups frozen while groups learn, as in the paper (read).

    The presets of small models train them too: a few frozen blocks are much of such a model.
    """
    stages = tuple(
        replace(stage, train=tuple("groups" if w == "blocks" else w for w in stage.train))
        for stage in recipe.stages
    )
    return replace(recipe, name=f"{recipe.name}-frozen", stages=stages)


def width_pruned(recipe: Recipe, ratio: float) -> Recipe:
    """FFNs of `ratio` quarters of the dense ones: the most important neurons stay, by the scores.

    A shared expert of that size whose experts, holding the rest, are never used: top_k 0. At 1.5 it
    works as much as 1S12E2A, at 2.0 as much as with four experts. Without groups of blocks: it is
    what the MoE is compared with. ValueError unless the rest can be dealt to experts of the
    recipe's size.
    """
    experts = (WHOLE - ratio) / recipe.expert_ratio
    if experts != int(experts) or experts < 1:
        raise ValueError(
            f"ratio is {ratio:g}; expected one that leaves a whole number of experts of "
            f"{recipe.expert_ratio:g} quarters of the FFN, such as 1.5."
        )
    stage = _alone(recipe, "pruned", recipe.stages[0], ("shared",))
    return replace(
        recipe,
        name=f"{recipe.name}-width-{ratio:g}",
        shared_ratio=ratio,
        num_experts=int(experts),
        shares=Shares(),
        top_k=0,
        blocks=Blocks(),
        stages=(replace(stage, top_k=0, steps=recipe.steps),),
    )


def leaner(recipe: Recipe, by: int) -> Recipe:
    """Shared expert and experts `by` times smaller, as many of them chosen; more hold the rest.

    Our own addition: it asks what the experts are worth where the activated FFN is too small to do
    the work alone. ValueError where neurons cannot be dealt so.
    """
    experts = (WHOLE * by - recipe.shared_ratio) / recipe.expert_ratio
    if by < 1 or experts != int(experts):
        raise ValueError(
            f"by is {by}; expected a whole number from 1 that leaves a whole number of experts of "
            f"{recipe.expert_ratio:g} / by quarters of the FFN, such as 4."
        )
    return replace(
        recipe,
        name=f"{recipe.name}-{by}-times-leaner",
        shared_ratio=recipe.shared_ratio / by,
        expert_ratio=recipe.expert_ratio / by,
        num_experts=int(experts),
    )


def depth_pruned(
    recipe: Recipe, depth: Mapping[str, int], way: str, runs: Mapping[str, Any] | None = None
) -> Recipe:
    """As many blocks as the recipe's groups run, but always the same ones, for good.

    way "first" keeps the first kappa blocks of every group (as BK-SDM keeps the first of a pair),
    "middle" drops one run of neighbours amid each kind of blocks (as FLUX.1-Lite does), "linear"
    the run that a linear map replaces best (as PPCL looks for runs); all are our reading of these.
    `depth`: the model's number of blocks by kind; `runs`: for "linear", what
    `scripts.reproduce.probe` measured. Stages that train groups train all the blocks that are left.
    ValueError for a recipe without groups.
    """
    if not recipe.blocks.grouped or way not in ("first", "middle", "linear"):
        raise ValueError(
            f"way is {way!r} and the recipe has groups {recipe.blocks.to_dict()['groups']}; "
            "expected way first, middle or linear, and a recipe with groups to count the blocks by."
        )
    drop: dict[str, tuple[int, ...]] = {}
    for kind in KINDS:
        groups = recipe.blocks.groups(kind)
        later = [index for group in groups for index in group[recipe.blocks.kappa :]]
        begin = (depth[kind] - len(later)) // 2
        if way == "linear" and later:
            begin = best_run((runs or {})[kind], len(later))
        run = range(begin, begin + len(later))
        drop[kind] = tuple(later if way == "first" else run)
    stages = tuple(
        _alone(recipe, "pruned", stage, ("blocks",)) if "router" in stage.train else stage
        for stage in recipe.stages
    )
    blocks = Blocks(drop_double=drop["double"], drop_single=drop["single"])
    return replace(recipe, name=f"{recipe.name}-depth-{way}", blocks=blocks, stages=stages)


def best_run(errors: Mapping[str, float], length: int) -> int:
    """The first block of the run of `length` whose linear map errs least; errors: "2-4" -> error.

    ValueError where no run of that length was measured.
    """
    found = {}
    for name, error in errors.items():
        first, last = map(int, name.split("-"))
        if last - first + 1 == length:
            found[first] = error
    if not found:
        raise ValueError(f"no run of {length} blocks was measured, only {', '.join(errors)}.")
    return min(found, key=lambda first: found[first])


def _alone(recipe: Recipe, name: str, stage: Stage, train: tuple[str, ...]) -> Stage:
    """A stage without experts' or groups' losses; modulation learns where it does in the recipe."""
    if any("adaln" in each.train for each in recipe.stages) and "blocks" not in train:
        train = (*train, "adaln")
    return replace(
        stage, name=name, train=train, losses={"output": 1.0, "feature": 1.0}, kappa=None
    )
