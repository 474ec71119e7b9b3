"""FLUX.1's ControlNets for export: FluxControlNetModel, of one kind or a union of several.

A union puts a token that names the kind before the text. Its place is there in the input already,
`encoder_hidden_states` [B, 1 + L, width] with anything in the first row: so the text has one length
in all of the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from export.control.program import Control
from export.families import flux
from export.graph.trace import Spec


class Embed(nn.Module):
    """What FluxControlNetModel does before its blocks; parameter names are the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.x_embedder = model.x_embedder
        self.controlnet_x_embedder = model.controlnet_x_embedder
        self.context_embedder = model.context_embedder
        self.time_text_embed = model.time_text_embed
        self.controlnet_mode_embedder = model.controlnet_mode_embedder if model.union else None

    def forward(
        self, hidden_states: Tensor, control: Tensor, mode: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, ...]:
        """-> image tokens [B, T, D], text tokens [B, L or 1 + L, D], temb [B, D].

        hidden_states, control [B, T, channels]; mode [B], int64; others: see flux.Embed.
        """
        image, text, temb = flux.Embed.forward(self, hidden_states, **others)  # type: ignore[arg-type]
        image = image + self.controlnet_x_embedder(control)
        if self.controlnet_mode_embedder is not None:
            kind = self.controlnet_mode_embedder(mode)
            text = torch.cat([kind[:, None], text[:, 1:]], dim=1)
        return image, text, temb


def environment(model: Any, dtype: torch.dtype) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """FLUX's, with the control image's latents and a union's kind."""
    inputs, inner = flux.tensors_before_the_end(model, dtype)
    inputs["control"] = inputs["hidden_states"]
    if model.union:
        inputs["mode"] = Spec(torch.int64, ("batch",))
    return inputs, inner


def check(config: Mapping[str, Any]) -> None:
    """See Control."""
    if config.get("conditioning_embedding_channels") is not None:
        raise ValueError(
            "has conditioning_embedding_channels"
            f" {config['conditioning_embedding_channels']!r}, expected null: ControlNets that read"
            " pixels (XLabs') are not exported; take one that reads latents (InstantX', Shakker's)."
        )


FLUX = Control(
    family="flux",
    cls="FluxControlNetModel",
    stacks=lambda model: {
        "transformer_blocks": model.controlnet_blocks,
        "single_transformer_blocks": model.controlnet_single_blocks,
    },
    environment=environment,
    embed=Embed,
    tracing=flux.FLUX.tracing,
    check=check,
    record=lambda config: {
        "modes": config.get("num_mode") or 0,
        "shifted": True,
        "pooled": "prompt",
        "channels": config["in_channels"] // 4,
    },
)
