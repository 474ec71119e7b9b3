"""Stable Diffusion 3's and 3.5's ControlNets for export: SD3ControlNetModel.

Those of 3.5 large have no table of positions and read no text: they take the embedding of patches
from the transformer that they control, here from its bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.control.program import Control
from export.families import sd3
from export.graph.program import Row
from export.graph.trace import Spec


class Embed(nn.Module):
    """What SD3ControlNetModel does before its blocks; parameter names are the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pos_embed = model.pos_embed
        self.pos_embed_input = model.pos_embed_input
        self.time_text_embed = model.time_text_embed
        self.context_embedder = model.context_embedder

    def forward(
        self,
        hidden_states: Tensor,
        control: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        positions: Tensor,
        encoder_hidden_states: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """-> image tokens [B, T, D], text tokens [B, L, D] where it reads any, temb [B, D].

        control [B, T, C p p]: patches of the control image's latents; others: see sd3.Embed.
        """
        image = sd3.embed_patches(self.pos_embed, hidden_states, positions)
        hint = self.pos_embed_input.proj
        image = image + F.linear(control, hint.weight.flatten(1), hint.bias)
        temb = self.time_text_embed(timestep, pooled_projections)
        if self.context_embedder is None:
            return image, temb
        return image, self.context_embedder(encoder_hidden_states), temb


def environment(model: Any, dtype: torch.dtype) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """SD3's, with the control image's latents; without text where the ControlNet reads none."""
    config = model.config
    image = ("batch", "image_tokens")
    patch = Spec(dtype, (*image, config.patch_size**2 * config.in_channels))
    inputs = {
        "hidden_states": patch,
        "control": patch,
        "pooled_projections": Spec(dtype, ("batch", config.pooled_projection_dim)),
        "timestep": Spec(torch.float32, ("batch",)),
        "positions": Spec(torch.int64, ("image_tokens",)),
    }
    inner = {"hidden_states": Spec(dtype, (*image, model.inner_dim))}
    if model.context_embedder is not None:
        text = ("batch", "text_tokens")
        inputs["encoder_hidden_states"] = Spec(dtype, (*text, config.joint_attention_dim))
        inner["encoder_hidden_states"] = Spec(dtype, (*text, config.caption_projection_dim))
    return inputs, inner | {"temb": Spec(dtype, ("batch", model.inner_dim))}


def call_single(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """A block of a ControlNet without text."""
    return run(tensors["hidden_states"], tensors["temb"])


def row(block: nn.Module) -> Row:
    """The transformer's blocks, or those of the image alone."""
    if type(block).__name__ == "SD3SingleTransformerBlock":
        return Row("image", ("hidden_states", "temb"), ("hidden_states",), call_single)
    return sd3.row(block)


def check(config: Mapping[str, Any]) -> None:
    """See Control."""
    if config.get("extra_conditioning_channels"):
        raise ValueError(
            f"has extra_conditioning_channels {config['extra_conditioning_channels']!r}, expected"
            " 0: ControlNets for inpainting are not exported."
        )


def prepare(model: Any) -> None:
    """The table of positions becomes a weight."""
    sd3.table_as_weight(model.pos_embed)


SD3 = Control(
    family="sd3",
    cls="SD3ControlNetModel",
    stacks=lambda model: {"transformer_blocks": model.controlnet_blocks},
    environment=environment,
    embed=Embed,
    tracing=replace(sd3.SD3.tracing, row=row, prepare=prepare),
    check=check,
    record=lambda config: {
        "modes": 0,
        # read: those of InstantX keep the shift and read no pooled text, others the opposite.
        "shifted": not config["force_zeros_for_pooled_projection"],
        "pooled": "zeros" if config["force_zeros_for_pooled_projection"] else "prompt",
        "channels": config["in_channels"],
    },
)
