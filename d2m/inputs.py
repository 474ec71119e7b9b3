"""From a batch of data to the keyword inputs of a FLUX transformer.

B batch, T image tokens, C packed channels, L text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

CONDITIONS = ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids")
GUIDANCE = 3.5  # ours, where a batch brings none: what FLUX.1 [dev] is drawn with


def transformer_inputs(
    model: nn.Module, batch: Mapping[str, Tensor], x: Tensor, t: Tensor
) -> dict[str, Tensor]:
    """What `model(**inputs)` takes, on the model's device.

    Args:
        batch: CONDITIONS, and `guidance` [B] where it should not be GUIDANCE (it is left out for a
            model without guidance embedding).
        x [B, T, C]: noisy latents.
        t [B]: their times in [0, 1], 1 pure noise; the model multiplies by 1000 itself.
    """
    import torch

    inputs = {name: batch[name] for name in CONDITIONS}
    inputs |= {"hidden_states": x, "timestep": t}
    if model.config.guidance_embeds:  # type: ignore[union-attr]
        inputs["guidance"] = batch.get("guidance", torch.full_like(t, GUIDANCE))
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}
