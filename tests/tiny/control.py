"""Tiny but genuine ControlNets of FLUX.1 and SD3: the real classes, random weights everywhere."""

from __future__ import annotations

from typing import Any

from tests.tiny.families import SD3_CONFIG
from tests.tiny.pipeline import TRANSFORMER_CONFIG, randomize


def flux_controlnet(seed: int = 7, **config: Any) -> Any:
    """One double block and one single; `config`: others of its fields (num_mode: a union)."""
    from diffusers import FluxControlNetModel

    facts = {**TRANSFORMER_CONFIG, "num_layers": 1, "num_single_layers": 1, **config}
    return randomize(FluxControlNetModel(**facts), seed).eval()


def sd3_controlnet(seed: int = 7, **config: Any) -> Any:
    """Two blocks, one of them with a second attention."""
    from diffusers import SD3ControlNetModel

    facts = {**SD3_CONFIG, "num_layers": 2, "dual_attention_layers": (0,), **config}
    return randomize(SD3ControlNetModel(**facts), seed).eval()
