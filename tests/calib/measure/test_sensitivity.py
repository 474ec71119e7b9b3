"""What leaving blocks out and making FFNs sparse does: against the converted model itself."""

import dataclasses

import pytest
import torch

from calib.measure.sensitivity import Sensitivity, damage, left_out, sensitivity, sparse_sites
from d2m.families import FLUX
from d2m.families.ffn_sites import sites_of
from d2m.recipe.recipe import Calibration, preset
from d2m.recipe.structure import Shares
from tests.tiny.pair import tiny_batches, tiny_pair
from tests.tiny.pipeline import tiny_inputs

RECIPE = dataclasses.replace(preset("L"), stages=(), calibration=Calibration(2, 2))


def scores_of(model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """As tiny_pair draws them."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name, _, _ in sites_of(model.state_dict(), FLUX)]
    return {name: torch.rand(128, generator=generator) for name in names}


@pytest.mark.parametrize("top_k", [0, 2, 12])
@pytest.mark.parametrize("share", [1.0, 2.5])
def test_sparse_sites_are_the_conversion(top_k: int, share: float) -> None:
    """All FFNs at once: the hooks give what the converted model gives before training."""
    recipe = dataclasses.replace(RECIPE, top_k=top_k, shares=Shares((share,) * 2, (share,) * 2))
    student, teacher = tiny_pair(0, recipe, torch.float64)
    inputs = tiny_inputs(0, torch.float64)
    before = teacher(**inputs).sample
    every = sites_of(teacher.state_dict(), FLUX)
    with torch.no_grad():
        expected = student(**inputs).sample
        with sparse_sites(teacher, every, scores_of(teacher), recipe.spec.at("double", 0), 0):
            found = teacher(**inputs).sample
    assert (found - expected).norm() < 1e-7 * expected.norm()
    assert (expected - before).norm() > 1e-3 * expected.norm()
    assert torch.equal(teacher(**inputs).sample, before)


def test_left_out_blocks_hand_on() -> None:
    _, model = tiny_pair()
    inputs = tiny_inputs(0)
    point = inputs, inputs["hidden_states"]
    blocks = list(model.single_transformer_blocks)
    with torch.no_grad():
        expected = [model(**inputs).sample.double()]
        with left_out(model.single_transformer_blocks, range(1, 2)):
            assert damage(model, [point], expected) > 1e-4
            shorter = model(**inputs).sample
        model.single_transformer_blocks = torch.nn.ModuleList(blocks[:1])
        assert torch.equal(model(**inputs).sample, shorter)
        model.single_transformer_blocks = torch.nn.ModuleList(blocks)
        assert damage(model, [point], expected) == 0


def test_everything_is_measured_and_nothing_is_left_changed() -> None:
    _, model = tiny_pair()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    specs = [dataclasses.replace(RECIPE.spec, top_k=k) for k in (0, 2, 12)]
    told: list[tuple[str, int, int]] = []
    arguments = (model, tiny_batches, RECIPE, scores_of(model), specs, 2)
    found = sensitivity(*arguments, progress=lambda *row: told.append(row))
    assert isinstance(found, Sensitivity)
    assert set(found.skipped["double"]) == {(0, 1), (1, 1), (0, 2)}
    assert [len(row) for row in found.ffn["single"]] == [3, 3]
    values = [*found.skipped["double"].values(), *found.ffn["single"][0]]
    assert all(0 < value < 10 for value in values)
    assert told[-1] == ("sensitivity", 18, 18) and len(told) == 18
    assert sensitivity(*arguments) == found  # the same draws
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
