"""The block schedule of a whole generation, before its first step: what routers of alpha 0 choose.

With alpha 0 a router reads the global embedding alone: time, guidance and pooled text, all of them
known before anything is drawn (ours; paper.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2m.families.inputs import global_embedding
from d2m.model.block_group import block_groups


@torch.no_grad()
def block_schedule(
    model: nn.Module,
    timesteps: Tensor | Sequence[float],
    pooled_projections: Tensor,
    guidance: Tensor | float | None = None,
) -> dict[str, Tensor]:
    """Which blocks every group will run, for every step and prompt.

    Args:
        model: a sparse transformer whose groups all have alpha 0.
        timesteps [S]: as its forward gets them, in [0, 1] (a scheduler's timesteps / 1000).
        pooled_projections [B, P]: the prompts' pooled text.
        guidance: scale, or [B]; for a model with guidance embedding.

    Returns {group name: first chosen block [S, B]}, int64 on the CPU, counted in the dense model's
    list; kappa blocks run from there. Computed step by step with the batch's own shapes, so that it
    rounds as the model will.

    Raises ValueError for a router with another alpha or a model without groups.
    """
    groups = block_groups(model)
    if not groups:
        raise ValueError("the model has no groups of blocks; expected one converted with groups.")
    for name, group in groups.items():
        if group.router.alpha:
            raise ValueError(
                f"the router of {name} has alpha {group.router.alpha:g}, so its choice depends on "
                "the image; expected 0: convert with blocks.alpha 0 to know it beforehand."
            )
    weight = next(model.parameters())
    pooled = pooled_projections.to(weight.device)
    batch, nothing = len(pooled), torch.empty(0)
    inputs = {"pooled_projections": pooled}
    if model.config.get("guidance_embeds"):  # type: ignore[union-attr]
        if guidance is None:
            raise ValueError("guidance is None; this model embeds it: give the scale, such as 3.5.")
        inputs["guidance"] = torch.as_tensor(guidance, device=weight.device).float().expand(batch)
    chosen: dict[str, list[Tensor]] = {name: [] for name in groups}
    for time in torch.as_tensor(timesteps).reshape(-1).to(weight.device):
        temb = global_embedding(model, inputs, time.expand(batch))
        for name, group in groups.items():
            start = group.window_logits(nothing, nothing, temb).argmax(-1).cpu()
            chosen[name].append(start + group.indices[0])
    return {name: torch.stack(rows) for name, rows in chosen.items()}
