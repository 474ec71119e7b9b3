"""First weights of the groups' routers that choose: centred and scaled on calibration data.

A random router's logits are nearly the same for every sample, since what it looks at (pooled
tokens, the global embedding) is mostly its own mean: one block of a group takes all samples from
the first step on, learns, and keeps them, and the mixture is a pruned model. Measured so on the
shapes teacher: all three groups of S chose one block for every sample after 20 steps (LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from d2m.families.flow import generator_at
from d2m.families.inputs import noised, transformer_inputs
from d2m.model.block_group import BlockGroup, block_groups, named_inputs, pool
from d2m.model.surgery import unit_gates
from d2m.recipe.recipe import Batches, Recipe

SPREAD = 1.0  # ours: standard deviation of a block's logit over samples


@torch.no_grad()
def spread_routers(
    student: nn.Module, batches: Batches, recipe: Recipe, seed: int = 0
) -> dict[str, Tensor]:
    """New weights of all routers, by full name, float32; the student is only run.

    It runs with all experts and blocks on, as the dense model does, on the recipe's calibration
    batches. Both of a router's weights lose their share along the mean of what they look at, and
    are scaled together until logits have a standard deviation of SPREAD: samples, not chance,
    decide which block they begin with.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in block_groups(student)}
    with ExitStack() as hooks, unit_gates(student):
        for name, group in block_groups(student).items():
            hook = group.register_forward_pre_hook(_record_inputs(seen[name]), with_kwargs=True)
            hooks.enter_context(hook)
        for i in range(recipe.calibration.batches):
            batch = batches(i, recipe.calibration.batch_size)
            generator = generator_at(seed, "routers", i)
            x, t, _ = noised(student, batch, generator, recipe.t_mean, recipe.t_std)
            student(**transformer_inputs(student, batch, x, t))
    found: dict[str, Tensor] = {}
    for name, group in block_groups(student).items():
        tokens, embeddings = (torch.cat(rows) for rows in zip(*seen[name]))
        for part, weight in spread(group, tokens, embeddings).items():
            found[f"{name}.router.{part}"] = weight
    return found


def _record_inputs(rows: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    """A hook that keeps what the group's router would look at: [B, 2 D] and [B, D], float64."""

    def hook(module: BlockGroup, args: Any, inputs: dict[str, Any]) -> None:
        image, text, temb, mask = module.read(named_inputs(module, args, inputs))
        rows.append((pool(image, text, mask, torch.float64).cpu(), temb.double().cpu()))

    return hook


def spread(group: BlockGroup, tokens: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
    """A router's new weights from what it looks at: tokens [n, 2 D], embeddings [n, D]."""
    router = group.router
    parts = {"tokens.weight": (router.tokens, tokens, router.alpha)}
    parts["embedding.weight"] = (router.embedding, embeddings, 1 - router.alpha)
    weights, logits = {}, torch.zeros(len(tokens), len(group.blocks), dtype=torch.float64)
    for part, (linear, seen, share) in parts.items():
        weight, mean = linear.weight.detach().double().cpu(), seen.mean(0)
        weight = weight - (weight @ mean)[:, None] * mean / mean.square().sum()
        weights[part] = weight
        logits += share * seen @ weight.T
    scale = SPREAD / logits.std(0).mean().clamp_min(torch.finfo(torch.float32).tiny)
    return {part: (weight * scale).float() for part, weight in weights.items()}
