"""Neuron importance: by hand, against plain autograd, and as a prediction of what is lost."""

import dataclasses

import pytest
import torch

from calib.measure.importance import (
    flow_matching_loss,
    magnitudes,
    neuron_importance,
    scores_of,
    taylor,
    uniform,
)
from d2m.families import FLUX
from d2m.families.ffn_sites import read_ffn, sites_of
from d2m.families.flow import generator_at, noisy
from d2m.model.surgery import sparsify
from d2m.recipe.recipe import Calibration, SparseSpec, preset
from tests.tiny.pipeline import tiny_inputs, tiny_transformer

RECIPE = dataclasses.replace(preset("L"), calibration=Calibration(batches=3, batch_size=2))
SINGLE = "single_transformer_blocks.1.proj_mlp"


def batches(step, batch_size):
    inputs = tiny_inputs(seed=step, batch=batch_size)
    inputs["latents"] = inputs.pop("hidden_states")
    for name in ("timestep", "guidance"):
        inputs.pop(name)
    return inputs


def sites(model):
    return sites_of(model.state_dict(), FLUX)


def test_by_hand():
    """A loss that is linear in the weights: dL/dw is the coefficient, so the score is |c w|."""
    model = tiny_transformer()
    block = model.single_transformer_blocks[1]
    rows, bias = torch.zeros(128, 32), torch.zeros(128)
    columns = torch.zeros(32, 160)
    rows[3, :2] = torch.tensor([2.0, -5.0])
    bias[3], bias[7] = -1.0, 10.0
    columns[4, 32 + 3], columns[1, 5] = 4.0, 1000.0  # column 5 is the attention's

    def loss():
        return (
            (block.proj_mlp.weight * rows).sum()
            + (block.proj_mlp.bias * bias).sum()
            + (block.proj_out.weight * columns).sum()
        )

    def losses():
        yield loss()
        yield -3 * loss()

    scores = taylor(model, losses(), 2)
    w1, b1, w2 = block.proj_mlp.weight, block.proj_mlp.bias, block.proj_out.weight
    by_hand = torch.zeros(128)
    by_hand[3] = 2 * w1[3, 0].abs() + 5 * w1[3, 1].abs() + b1[3].abs() + 4 * w2[4, 35].abs()
    by_hand[7] = 10 * b1[7].abs()
    assert torch.allclose(scores[SINGLE], by_hand * (1 + 3) / 2, rtol=1e-6)
    assert not any(score.any() for name, score in scores.items() if name != SINGLE)


def test_against_plain_autograd():
    model = tiny_transformer()
    actual = neuron_importance(model, batches, RECIPE, seed=5)
    expected = {name: torch.zeros(128) for name, _, _ in sites(model)}
    for i in range(3):
        model.zero_grad()
        generator = generator_at(5, "taylor", i)
        flow_matching_loss(model, batches(i, 2), generator, RECIPE.t_mean, RECIPE.t_std).backward()
        product = {n: (p * p.grad).abs().detach() for n, p in model.named_parameters()}
        for name, block, site in sites(model):
            fc1_w, fc1_b, fc2_w, _ = read_ffn(product.__getitem__, block, site)
            expected[name] += (fc1_w.sum(1) + fc1_b + fc2_w.sum(0)) / 3
    assert actual.keys() == expected.keys()
    for name, score in actual.items():
        assert torch.allclose(score, expected[name], rtol=1e-4), name
        assert score.dtype == torch.float32 and (score > 0).all()


def test_model_is_left_as_it_was():
    model = tiny_transformer()
    model.transformer_blocks[0].requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    neuron_importance(model, batches, RECIPE)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert not parameter._post_accumulate_grad_hooks


def test_predicts_what_removing_a_neuron_costs():
    """First order: on one batch, the signed sum is the slope of the loss as a neuron fades."""
    model = tiny_transformer(dtype=torch.float64)

    def loss():
        batch = {n: t.double() for n, t in batches(0, 2).items()}
        return flow_matching_loss(model, batch, generator_at(0, 0))

    scores = taylor(model, (loss() for _ in range(1)), 1)
    block = model.single_transformer_blocks[1]
    neurons = scores[SINGLE].argsort(descending=True)[:5].tolist()
    model.zero_grad()
    loss().backward()
    for neuron in neurons:
        slope = (block.proj_out.weight.grad * block.proj_out.weight)[:, 32 + neuron].sum().item()
        with torch.no_grad():
            column = block.proj_out.weight[:, 32 + neuron].clone()
            ends = []
            for scale in (1 - 1e-5, 1 + 1e-5):
                block.proj_out.weight[:, 32 + neuron] = column * scale
                ends.append(loss().item())
            block.proj_out.weight[:, 32 + neuron] = column
        assert abs((ends[1] - ends[0]) / 2e-5 - slope) < 1e-4 * abs(slope) + 1e-9
        assert scores[SINGLE][neuron] >= abs(slope)


def test_flow_matching_loss_is_zero_for_a_perfect_model():
    batch = batches(0, 2)
    x, t, velocity = noisy(batch["latents"], generator_at(0, 0))
    assert torch.allclose(x + (1 - t[:, None, None]) * velocity, batch["latents"] + velocity)
    assert torch.allclose(x - t[:, None, None] * velocity, batch["latents"], atol=1e-5)

    class FluxTransformer2DModel(torch.nn.Module):  # families know models by this name
        config = tiny_transformer().config

        def __init__(self):
            super().__init__()
            self.place = torch.nn.Parameter(torch.zeros(()))  # tells the device

        def forward(self, hidden_states, timestep, guidance, return_dict, **conditions):
            assert torch.equal(hidden_states, x) and torch.equal(timestep, t)
            assert guidance.tolist() == [3.5, 3.5] and not return_dict
            assert set(conditions) == {
                "encoder_hidden_states",
                "pooled_projections",
                "img_ids",
                "txt_ids",
            }
            return (velocity,)

    assert flow_matching_loss(FluxTransformer2DModel(), batch, generator_at(0, 0)) == 0


def test_magnitude_and_random_run_nothing():
    model = tiny_transformer()
    scores = scores_of(model, magnitudes)
    block = model.transformer_blocks[1]
    linear1, linear2 = block.ff_context.net[0].proj, block.ff_context.net[2]
    expected = linear1.weight[9].abs().sum() + linear1.bias[9].abs()
    expected = expected + linear2.weight[:, 9].abs().sum()
    assert torch.allclose(scores["transformer_blocks.1.ff_context"][9], expected)

    def nothing(step, batch_size):
        raise AssertionError("no batch is needed")

    for split, function in (("magnitude", magnitudes), ("random", uniform(3))):
        recipe = dataclasses.replace(RECIPE, split=split)
        again = neuron_importance(model, nothing, recipe, seed=3)
        known = scores_of(model, function)
        assert all(torch.equal(again[name], score) for name, score in known.items())
    first, second = scores_of(model, uniform(3)), scores_of(model, uniform(4))
    assert not torch.equal(first[SINGLE], second[SINGLE])
    assert not torch.equal(first[SINGLE], first["single_transformer_blocks.0.proj_mlp"])


def test_progress_and_sparse_models():
    calls = []
    neuron_importance(tiny_transformer(), batches, RECIPE, progress=lambda *a: calls.append(a))
    assert calls == [("importance", 1, 3), ("importance", 2, 3), ("importance", 3, 3)]
    with pytest.raises(ValueError, match="no dense FFN to score"):
        neuron_importance(sparsify(tiny_transformer(), SparseSpec()), batches, RECIPE)
