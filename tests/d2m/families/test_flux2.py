"""FLUX.2's list of weights against the real class, weight by weight, and its published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2m.families.flux2.weights import weights
from d2m.families.weights import Structure
from d2m.plan.count import plan
from d2m.plan.model_config import sizes, subject_of
from tests.tiny.flux2 import FLUX2_CONFIG, flux2_transformer

# Published names, and totals as counted on the real class (10^9): 4B, 9B and 32B.
TOTALS = {"flux2-klein-4b": 3.876, "flux2-klein-9b": 9.079, "flux2-dev": 32.223}


def listed(config: Any, structure: Structure) -> dict[str, int]:
    """Parameter name -> size; a weight that two parts share is listed in both."""
    found: dict[str, int] = {}
    for stack in weights(config, structure, 16, 8):
        for weight in stack.weights:
            places = range(stack.count) if "*" in stack.prefix else [0]
            for index in places if weight.size else ():
                name = stack.prefix.replace("*", str(index)) + weight.name
                found[name] = found.get(name, 0) + weight.size
    return found


def real(config: Any) -> dict[str, int]:
    from diffusers import Flux2Transformer2DModel

    fields = {name: value for name, value in config.items() if value is not None}
    with torch.device("meta"):
        model = Flux2Transformer2DModel(**fields, axes_dims_rope=(32, 32, 32, 32))
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", TOTALS)
def test_every_weight_of_the_published_configs(name: str) -> None:
    config = subject_of(name).config
    assert listed(config, Structure()) == real(config)
    answer = plan(name)
    assert answer["total_params"] == sum(real(config).values())
    assert answer["total_params"] / 1e9 == pytest.approx(TOTALS[name], rel=1e-3)
    assert answer["family"] == f"FLUX.2 [{'dev' if 'dev' in name else 'klein'}]"


@pytest.mark.parametrize("guided", [True, False])
def test_every_weight_and_flop_of_a_tiny_model(guided: bool) -> None:
    config = sizes(
        FLUX2_CONFIG | {"guidance_embeds": guided, "_class_name": "Flux2Transformer2DModel"}, "t"
    )
    model = flux2_transformer(guidance_embeds=guided)
    own = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert listed(config, Structure()) == own
    given = {
        "hidden_states": torch.randn(1, 12, 16),
        "encoder_hidden_states": torch.randn(1, 5, 72),
        "timestep": torch.rand(1),
        "guidance": torch.full((1,), 4.0) if guided else None,
        "img_ids": torch.zeros(12, 4),
        "txt_ids": torch.zeros(5, 4),
    }
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            model(**given)
    stacks = weights(config, Structure(), 12, 5)
    total = sum(stack.active * weight.flops for stack in stacks for weight in stack.weights)
    assert total == counter.get_total_flops()
