"""What the parts of a model cost under a recipe: FLOPs of its pieces, as `d2m plan` counts them.

Torch-free. A step is one denoising step of one image of the model's own size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from calib.budget.knapsack import Piece, smallest
from d2m.families.family import check_adaln
from d2m.families.weights import Stack, Structure
from d2m.plan.count import structure_of
from d2m.plan.model_config import Subject
from d2m.recipe.recipe import WHOLE, Recipe
from d2m.recipe.structure import KINDS, Blocks

SIZES = (2, 3, 4)  # blocks of a group; the paper's presets have groups of two to four
STEPS = (0.5, 0.75, 1.0, 1.25)  # a block's experts, times the recipe's: wider ones, less shared


@dataclasses.dataclass(frozen=True)
class Costs:
    """FLOPs of one step of one image: of the dense model, of all but blocks, of the pieces.

    block: kind -> block -> its FLOPs with each of the sizes. router: size of a group -> FLOPs, of
    sizes that the model can have.
    """

    dense: float
    fixed: float
    block: dict[str, list[list[float]]]
    router: dict[int, float]


def shares_of(base: Recipe, neurons: int, steps: Sequence[float] = STEPS) -> list[float]:
    """Shared experts to choose from, in quarters of an FFN of so many neurons, largest first.

    steps: the sizes of a block's experts, times the recipe's, rising.
    ValueError if the recipe's own does not make whole sizes.
    """
    whole = base.shared_ratio + base.num_experts * base.expert_ratio
    found = []
    for step in steps:
        share = whole - base.num_experts * base.expert_ratio * step
        hidden, first = (neurons * ratio / WHOLE for ratio in (base.expert_ratio * step, share))
        if share > 0 and hidden == int(hidden) and first == int(first):
            found.append(share)
    if not found:
        raise ValueError(
            f"recipe {base.name}: experts of expert_ratio {base.expert_ratio:g} quarters of the "
            f"FFN's {neurons} neurons have no whole size; expected a recipe whose experts fit the "
            "model."
        )
    return found


def resized(base: Recipe, share: float) -> Recipe:
    """The recipe with shared experts of `share`, and no neuron lost."""
    whole = base.shared_ratio + base.num_experts * base.expert_ratio
    expert = (whole - share) / base.num_experts
    return dataclasses.replace(base, shared_ratio=share, expert_ratio=expert)


def costs_of(subject: Subject, base: Recipe, options: Sequence[float]) -> Costs:
    """FLOPs of the parts, as `d2m plan` counts them."""
    depth = subject.depth
    block: dict[str, list[list[float]]] = {k: [[] for _ in range(n)] for k, n in depth.items()}
    stacks: Sequence[Stack] = ()
    for share in options:
        stacks = _stacks(subject, resized(base, share))
        for kind, name in subject.family.blocks.kinds:
            inside = [stack for stack in stacks if stack.prefix == f"{name}.*."]
            for i, row in enumerate(block[kind]):
                own = (stack for stack in inside if not stack.blocks or i in stack.blocks)
                row.append(float(sum(w.flops for stack in own for w in stack.weights)))
    own_lists = tuple(f"{name}." for _, name in subject.family.blocks.kinds)
    others = [stack for stack in stacks if not stack.prefix.startswith(own_lists)]
    fixed = sum(stack.active * w.flops for stack in others for w in stack.weights)
    router = {}
    for size in SIZES:
        group = tuple(range(size))
        fits = {kind: depth[kind] >= size and can_group(subject, kind, 0, size) for kind in KINDS}
        lists = [(group,) if fits[kind] else () for kind in KINDS]
        if any(lists):
            blocks = Blocks(lists[0], () if lists[0] else lists[1], alpha=base.blocks.alpha)
            rows = _stacks(subject, dataclasses.replace(base, blocks=blocks))
            inside = [stack for stack in rows if ".router." in stack.prefix]
            router[size] = float(sum(w.flops for stack in inside for w in stack.weights))
    whole = subject.family.plan.weights(subject.config, Structure(), *_tokens(subject))
    return Costs(float(_sum(whole)), float(fixed), block, router)


def flops_of(subject: Subject, recipe: Recipe) -> float:
    """FLOPs of one step of a model made by a recipe."""
    return float(_sum(_stacks(subject, recipe)))


def can_group(subject: Subject, kind: str, first: int, size: int) -> bool:
    """Whether the family may have a group of these blocks."""
    group = (tuple(range(first, first + size)),)
    blocks = Blocks(single=group) if kind == "single" else Blocks(double=group)
    try:
        subject.family.blocks.check_blocks(blocks, subject.depth)
    except ValueError:
        return False
    return True


def check_reach(subject: Subject, costs: Costs, budget: float) -> float:
    """The smallest share of dense FLOPs there is; ValueError naming it if it is over `budget`."""
    depth = subject.depth
    every = [
        Piece(kind, i, size, 0, min(costs.block[kind][i + size - 1]) + router, 0.0)
        for kind in KINDS
        for size, router in ((1, 0.0), *costs.router.items())
        for i in range(depth[kind] - size + 1)
        if size == 1 or can_group(subject, kind, i, size)
    ]
    least = smallest(depth, every) + costs.fixed
    if least > budget * costs.dense:
        groups = f"groups of up to {max(costs.router)} blocks and " if costs.router else ""
        up = -(-least * 1000 // costs.dense) / 1000
        raise ValueError(
            f"--budget is {budget:g}, but {groups}the smallest FFNs still need "
            f"{least / costs.dense:.4f} of the dense model's FLOPs; expected {up:g} or more."
        )
    return least / costs.dense


def _stacks(subject: Subject, recipe: Recipe) -> list[Stack]:
    check_adaln(subject.family, recipe.adaln.mode)
    return subject.family.plan.weights(subject.config, structure_of(recipe), *_tokens(subject))


def _tokens(subject: Subject) -> tuple[int, int]:
    image = (subject.height // subject.pixels) * (subject.width // subject.pixels)
    return image, subject.text_tokens


def _sum(stacks: Sequence[Stack]) -> int:
    return sum(stack.active * weight.flops for stack in stacks for weight in stack.weights)
