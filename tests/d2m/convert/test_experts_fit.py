"""Experts of neurons that are active together, and routers that know them."""

import dataclasses

import pytest
import torch

from d2m.convert.experts_fit import SPREADS, clusters, evenly, fitted, fitted_gate
from d2m.families import FLUX
from d2m.families.ffn_sites import DenseFFN
from d2m.model.sparse_ffn import SparseFFN
from d2m.model.surgery import convert_ffn, gate_weight, run_dense, split_neurons
from d2m.recipe import recipe as recipes

D, N, E, H, S = 24, 128, 12, 8, 32  # width, neurons, experts, of an expert, shared
NAME = "transformer_blocks.0.ff"
RECIPE = dataclasses.replace(
    recipes.preset("L"), experts="coactivation", router="energy", stages=()
)


def themed(activation: str) -> tuple[DenseFFN, torch.Tensor, torch.Tensor]:
    """(FFN, inputs, theme of every neuron): a neuron answers to inputs of its own theme alone.

    Themes are directions, neurons in random order, their scores even.
    """
    at = torch.Generator().manual_seed(0)
    themes = torch.linalg.qr(torch.randn(D, D, generator=at))[0][:E]
    own = torch.arange(N - S).remainder(E)
    own = torch.cat([torch.full((S,), -1), own])[torch.randperm(N, generator=at)]
    up = torch.randn(N, D, generator=at) * 0.1
    up[own >= 0] = 4 * themes[own[own >= 0]] + 0.1 * torch.randn(N - S, D, generator=at)
    bias = torch.where(own >= 0, -3.0, 0.0)
    if activation == "swiglu":
        up, bias = torch.cat([up, torch.randn(N, D, generator=at)]), torch.cat([bias, bias * 0 + 1])
    down = torch.randn(D, N, generator=at) * 0.2
    ffn = DenseFFN(up, bias, down, torch.randn(D, generator=at))
    x = themes[torch.randint(E, (4000,), generator=at)] * 2
    return ffn, x + 0.1 * torch.randn(4000, D, generator=at), own


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_themes_become_experts_that_the_router_finds(activation: str) -> None:
    ffn, x, own = themed(activation)
    order = split_neurons(torch.where(own < 0, 2.0, 1.0), S, E)
    found = fitted(order, x, ffn, activation, NAME, RECIPE, FLUX)
    experts = own[found["neurons"][S:]].view(E, H)
    assert (experts == experts[:, :1]).all() and sorted(experts[:, 0].tolist()) == list(range(E))
    assert found["neurons"][:S].tolist() == order[:S].tolist()

    theme = torch.arange(E)[experts[:, 0].argsort()]  # expert of every theme
    wanted = theme[(x @ torch.linalg.pinv(_themes())).argmax(1)]
    logits = x @ found["gate.weight"].T
    assert (logits.argmax(1) == wanted).float().mean() > 0.99
    assert any(logits.std().item() == pytest.approx(size, rel=1e-3) for size in SPREADS)

    def error(tensors: dict[str, torch.Tensor]) -> float:
        sparse = SparseFFN(D, S, E, H, 2, activation=activation)
        sparse.load_state_dict(tensors)
        expected = run_dense(ffn, x, activation)
        with torch.no_grad():
            return ((sparse(x) - expected).norm() / expected.norm()).item()

    ranked = convert_ffn(ffn, order, S, E)
    assert error(found) < 0.7 * error(ranked | {"gate.weight": gate_weight(NAME, E, D, 0)})


def _themes() -> torch.Tensor:
    at = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(D, D, generator=at))[0][:E]


@pytest.mark.parametrize("experts", recipes.EXPERTS)
def test_all_experts_on_are_the_dense_ffn(experts: str) -> None:
    recipe = dataclasses.replace(RECIPE, experts=experts)
    ffn, x, _ = themed("gelu_tanh")
    wide = ffn.to(torch.float64)
    order = split_neurons(torch.rand(N, generator=torch.Generator().manual_seed(1)), S, E)
    found = fitted(order, x, wide, "gelu_tanh", NAME, recipe, FLUX)
    tensors = convert_ffn(wide, order, S, E) | found
    sparse = SparseFFN(D, S, E, H, E, dtype=torch.float64)
    sparse.load_state_dict(tensors)
    sparse.gate.weight.data.zero_()
    given = x[:50].double()
    expected = run_dense(wide, given, "gelu_tanh")
    with torch.no_grad():
        assert (sparse(given) - expected).norm() / expected.norm() < 1e-12
    assert sorted(tensors["neurons"].tolist()) == list(range(N))
    assert ("neurons" in found) == (experts == "coactivation")


def test_clusters_have_one_size_and_do_not_depend_on_what_was_random_before() -> None:
    at = torch.Generator().manual_seed(2)
    contributions = torch.rand(500, 96, generator=at)
    found = [clusters(contributions, E, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*found) and found[0].bincount().tolist() == [8] * E
    likeness = torch.tensor([[0.9, 0.8], [0.9, 0.1], [0.5, 0.6], [0.7, 0.9]])
    assert evenly(likeness, 2).tolist() == [0, 0, 1, 1]
    assert evenly(torch.rand(5, 1, generator=at), 5).tolist() == [0] * 5


def test_a_gate_of_equal_energies_is_finite() -> None:
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(4))
    assert torch.isfinite(fitted_gate(x, torch.ones(64, E))).all()
