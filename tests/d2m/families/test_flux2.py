"""FLUX.2's list of weights against the real class, weight by weight, and its published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2m.families.flux2.weights import weights
from d2m.families.known import FLUX2
from d2m.families.weights import Structure
from d2m.plan.count import plan
from d2m.plan.model_config import sizes, subject_of
from d2m.recipe.structure import Blocks
from tests.cases import flops
from tests.tiny.flux2 import FLUX2_CONFIG, flux2_transformer
from tests.tiny.pipeline import randomize

flops.register()
# Published names, and totals as counted on the real class (10^9): 4B, 9B and 32B.
INPUTS = {
    "hidden_states": torch.ones(1, 12, 16),
    "encoder_hidden_states": torch.ones(1, 5, 72),
    "timestep": torch.ones(1),
    "img_ids": torch.zeros(12, 4),
    "txt_ids": torch.zeros(5, 4),
}
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
    given = INPUTS | ({"guidance": torch.full((1,), 4.0)} if guided else {})
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            model(**given)
    stacks = weights(config, Structure(), 12, 5)
    total = sum(stack.active * weight.flops for stack in stacks for weight in stack.weights)
    assert total == counter.get_total_flops()


PRESETS = ("L", "M", "S", "XS")


@pytest.mark.parametrize("name", TOTALS)
def test_presets_are_as_much_faster_as_flux_1s(name: str) -> None:
    """A step's FLOPs over L's: as near FLUX.1's as groups of three single blocks allow."""
    subject = subject_of(name)
    shares = []
    for preset in PRESETS:
        answer = plan(name, preset=preset)
        assert answer["recipe"] == preset and answer["ffn_activated_share"] == 0.375
        shares.append(answer["flops_vs_dense"])
    own = [plan("flux-dev", preset=preset)["flops_vs_dense"] for preset in PRESETS]
    step = 2 / subject.depth["single"]  # what a group of three leaves out
    for share, of_flux_1 in zip(shares, own):
        assert share / shares[0] == pytest.approx(of_flux_1 / own[0], abs=step / 2)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_weight_of_the_presets(preset: str) -> None:
    """Of [klein] 4B, and the forward's FLOPs at its tiny depth."""
    from d2m.model.grouping import dense_name
    from d2m.model.sparse_transformer import sparse_class, structure
    from d2m.plan.count import structure_of
    from d2m.plan.presets import preset_file
    from d2m.recipe.recipe import load

    subject = subject_of("flux2-klein-4b")
    made = load(preset_file(preset, FLUX2, subject.depth))
    fields = {key: each for key, each in subject.config.items() if each is not None}
    with torch.device("meta"):
        model = sparse_class(FLUX2)(**fields, **structure(made))
    found = {dense_name(name): p.numel() for name, p in model.named_parameters()}
    assert found == listed(subject.config, structure_of(made))


@pytest.mark.parametrize("top_k", [0, 2, 12])
def test_flops_of_a_sparse_model(top_k: int) -> None:
    from d2m.model.sparse_transformer import sparse_class
    from d2m.recipe.recipe import SparseSpec

    config = sizes(FLUX2_CONFIG | {"_class_name": "Flux2Transformer2DModel"}, "tiny")
    groups = {"groups": {"double": [[0, 1]], "single": [[1, 2]]}, "kappa": 1}
    model = sparse_class(FLUX2)(**FLUX2_CONFIG, **groups, top_k=top_k)
    randomize(model, 0)
    blocks = Blocks(double=((0, 1),), single=((1, 2),), kappa=1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            model(**INPUTS)
    stacks = weights(config, Structure(SparseSpec(top_k=top_k), blocks), 12, 5)
    total = sum(stack.active * weight.flops for stack in stacks for weight in stack.weights)
    assert total == counter.get_total_flops()


@pytest.mark.parametrize("name", TOTALS)
def test_streamed_a_text_encoder_is_two_layers_and_its_embedding(name: str) -> None:
    from d2m.plan.needs import largest_component, run_needs

    encoder = subject_of(name).encoders["text_encoder"]
    layer = (encoder.bundled - encoder.largest) // encoder.layers
    held = 2 * (encoder.largest + 2 * layer)
    assert largest_component(name) == pytest.approx(held, rel=1e-6) and held < 4e9
    assert run_needs(name, offload=True).ram < run_needs(name).ram / 3
