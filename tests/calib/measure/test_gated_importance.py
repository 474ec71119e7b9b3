"""Importance and sensitivity of gated FFNs: a neuron is two rows and a column."""

import pytest
import torch

from calib.measure import importance
from calib.measure.sensitivity import sparse_sites
from d2m.families.ffn_sites import read_ffn, sites_of
from d2m.model.surgery import convert_state_dict, sparsify, split_neurons
from tests.cases.gated_blocks import CASES, SPEC, answers, family_of, layers, relative


def by_neuron(ffn, values):
    """Sums over a neuron's numbers of tensors shaped like the FFN's, None where it has none."""
    rows = values[0].sum(1) + (0 if values[1] is None else values[1])
    return rows[: ffn.neurons] + rows[ffn.neurons :] + values[2].sum(0)


@pytest.fixture(params=CASES)
def given(request, monkeypatch):
    make, bias, _ = CASES[request.param]
    _, inputs, sites = make(bias)
    model, family = layers(make, bias, 0), family_of(sites)
    monkeypatch.setattr(importance, "family_of_model", lambda model: family)
    return model, inputs, family, make, bias


def test_taylor_is_by_hand(given):
    model, inputs, family, _, _ = given

    def loss():
        return sum(out.square().mean() for block in model.layers for out in answers(block, inputs))

    found = importance.taylor(model, (loss() for _ in range(2)), 2)
    loss().backward()
    state = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in state.items()}
    for name, block, site in sites_of(state, family):
        weights = read_ffn(state.__getitem__, block, site)
        slopes = read_ffn(gradients.__getitem__, block, site)
        products = [None if w is None else (w * g).abs() for w, g in zip(weights, slopes)]
        expected = by_neuron(weights, products)
        assert found[name].shape == (weights.neurons,)
        assert relative(found[name].double(), expected.detach()) < 1e-6
    assert len(found) == len(sites_of(state, family))


def test_magnitudes_and_random(given):
    model, _, family, _, _ = given
    state = model.state_dict()
    found = importance.scores_of(model, importance.magnitudes)
    dealt = importance.scores_of(model, importance.uniform(3))
    for name, block, site in sites_of(state, family):
        ffn = read_ffn(state.__getitem__, block, site)
        expected = by_neuron(ffn, [None if w is None else w.abs() for w in ffn])
        assert relative(found[name].double(), expected) < 1e-6
        assert dealt[name].shape == (ffn.neurons,) and dealt[name].unique().numel() > 50


def test_hooks_answer_as_the_conversion_does(given):
    """Sensitivity's hooks on the dense block against the block that a conversion makes of it."""
    model, inputs, family, make, bias = given
    state = model.state_dict()
    scores = importance.scores_of(model, importance.uniform(3))
    here = sites_of(state, family)
    shared = {name: score.numel() // 4 for name, score in scores.items()}
    orders = {name: split_neurons(score, shared[name], 12) for name, score in scores.items()}
    sparse = sparsify(layers(make, bias, 1), SPEC, family)
    sparse.load_state_dict(convert_state_dict(state, orders, SPEC, family, 7))
    with torch.no_grad(), sparse_sites(model, here, scores, SPEC, 7):
        for before, after in zip(model.layers, sparse.layers):
            for one, other in zip(answers(before, inputs), answers(after, inputs), strict=True):
                assert relative(one, other) < 1e-6  # gates are float32 numbers in both
