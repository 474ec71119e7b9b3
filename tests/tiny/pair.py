"""A tiny teacher, a student made from it, data and a recipe: what distillation tests need."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from d2m.recipe.recipe import Recipe, Stage
from d2m.recipe.structure import Blocks
from tests.tiny.pipeline import tiny_inputs, tiny_transformer

if TYPE_CHECKING:
    import torch

LOSSES = {"output": 1.0, "feature": 1.0}
SHARED = Stage("shared", ("shared",), 0, 6, 3e-3, LOSSES, batch_size=2)
EXPERTS = Stage(
    "experts", ("experts", "gate"), 2, 6, 3e-3, LOSSES | {"balance": 0.01}, batch_size=2, ema=0.9
)
RECIPE = Recipe("tiny", stages=(SHARED, EXPERTS))


def recipe_with(steps: int, **changes: Any) -> Recipe:
    """RECIPE with that many steps in each stage and other fields changed in each."""
    stages = (replace(stage, steps=steps, **changes) for stage in RECIPE.stages)
    return replace(RECIPE, stages=tuple(stages))


def tiny_pair(
    seed: int = 0, recipe: Recipe = RECIPE, dtype: torch.dtype | None = None, **config: object
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(student, teacher): the student is the teacher's conversion under random importance."""
    import torch

    from d2m.families import family_of_model
    from d2m.families.ffn_sites import sites_of
    from d2m.model.sparse_transformer import sparse_model_of

    teacher = tiny_transformer(seed, dtype, **config)
    family, generator = family_of_model(teacher), torch.Generator().manual_seed(seed)
    names = [name for name, _, _ in sites_of(teacher.state_dict(), family)]
    scores = {name: torch.rand(4 * 32, generator=generator) for name in names}
    return sparse_model_of(teacher, scores, recipe, family), teacher


def tiny_batches(step: int, batch_size: int) -> dict[str, torch.Tensor]:
    """A batch of noise as data: a pure function of its arguments."""
    inputs = tiny_inputs(1000 + step, batch=batch_size)
    del inputs["timestep"], inputs["guidance"]
    inputs["latents"] = inputs.pop("hidden_states")
    return inputs


DEPTH = {"num_layers": 4, "num_single_layers": 5}
BLOCKS = Blocks(double=((1, 2, 3),), single=((0, 1), (2, 3, 4)))


def grouped_pair(
    seed: int = 0, blocks: Blocks = BLOCKS, dtype: torch.dtype | None = None, **changes: Any
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(student, teacher) of 4 double and 5 single blocks, the student with groups of them.

    The routers are strong enough that samples choose differently; the rest is as in `tiny_pair`.
    """
    import torch

    from d2m.model.block_group import block_groups

    student, teacher = tiny_pair(seed, replace(RECIPE, blocks=blocks, **changes), dtype, **DEPTH)
    generator = torch.Generator().manual_seed(seed)
    for group in block_groups(student).values():
        for parameter in group.router.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
    return student, teacher


GROUPS = Stage(
    "groups",
    ("groups", "router"),
    2,
    6,
    3e-3,
    {"output": 1.0, "group": 1.0, "balance": 0.01, "group_balance": 0.01},
    batch_size=2,
    kappa=1,
)
THREE = replace(RECIPE, stages=(SHARED, EXPERTS, GROUPS), blocks=BLOCKS)
