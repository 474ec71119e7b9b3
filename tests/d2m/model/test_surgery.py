"""Dense to sparse keeps the function and every neuron: the oracle of all that follows."""

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from d2m.families import FLUX
from d2m.families.ffn_sites import DenseFFN, read_ffn, read_rest, sites_of
from d2m.model.sparse_ffn import AttentionPlusFFN, SparseFFN
from d2m.model.sparse_transformer import SparseFluxTransformer2DModel
from d2m.model.surgery import (
    convert_ffn,
    convert_state_dict,
    gate_weight,
    identity_error,
    set_top_k,
    sparse_ffns,
    sparsify,
    split_neurons,
    unit_gates,
)
from d2m.recipe.recipe import SparseSpec
from tests.tiny.pipeline import TRANSFORMER_CONFIG, randomize, tiny_inputs, tiny_transformer

SPEC = SparseSpec(num_experts=12, shared_ratio=1.0, expert_ratio=0.25, top_k=2)
LIMITS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
D = 32


def unconvert_ffn(ffn):
    """A SparseFFN's tensors -> (fc1_w, fc1_b, fc2_w, fc2_b): every row back at its dense index."""
    experts, dim, _ = ffn["experts.w1"].shape
    home = torch.argsort(ffn["neurons"])
    w1 = ffn["experts.w1"].transpose(1, 2).reshape(-1, dim)
    w2 = ffn["experts.w2"].reshape(-1, dim).T / experts
    return (
        torch.cat([ffn["shared.fc1.weight"], w1])[home],
        torch.cat([ffn["shared.fc1.bias"], ffn["experts.b1"].reshape(-1)])[home],
        torch.cat([ffn["shared.fc2.weight"], w2], dim=1)[:, home],
        ffn["shared.fc2.bias"],
    )


def permutations_for(state, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: split_neurons(torch.rand(4 * D, generator=generator), D, 12)
        for name, _, _ in sites_of(state, FLUX)
    }


def pair(dtype, spec=SPEC, seed=0):
    """A dense tiny transformer and its conversion."""
    dense = tiny_transformer(seed, dtype)
    state = dense.state_dict()
    sparse = sparsify(tiny_transformer(seed + 100, dtype), spec)
    sparse.load_state_dict(convert_state_dict(state, permutations_for(state), spec, FLUX, seed))
    return dense, sparse


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---------------------------------------------------------------- the split


def test_split_by_hand():
    importance = torch.tensor([0.0, 5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0])
    # by rank: 3 7 | 5 1 4 6 2 0 -> dealt to two experts: 5 4 2 and 1 6 0
    assert split_neurons(importance, 2, 2).tolist() == [3, 7, 5, 4, 2, 1, 6, 0]


def test_split_is_a_permutation_and_shared_is_the_best():
    generator = torch.Generator().manual_seed(1)
    importance = torch.rand(4 * D, generator=generator)
    permutation = split_neurons(importance, D, 12)
    assert sorted(permutation.tolist()) == list(range(4 * D))
    assert importance[permutation[:D]].min() >= importance[permutation[D:]].max()
    sums = importance[permutation[D:]].view(12, -1).sum(1)
    assert (sums.max() - sums.min()) / sums.mean() < 0.3
    assert split_neurons(torch.ones(4 * D), D, 12)[:D].tolist() == list(range(D))


@pytest.mark.parametrize("importance", [torch.ones(30), torch.ones(2, 64), torch.ones(20)])
def test_split_that_does_not_come_out(importance):
    with pytest.raises(ValueError, match="importance has shape"):
        split_neurons(importance, D, 12)


def test_split_of_nan():
    with pytest.raises(ValueError, match="not finite"):
        split_neurons(torch.tensor([1.0, float("nan"), 0.0]), 1, 2)


# ---------------------------------------------------------------- one FFN


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
def test_identity_of_one_ffn(dtype, limit):
    dense = randomize(FeedForward(D, activation_fn="gelu-approximate"), 3).to(dtype)
    permutation = split_neurons(torch.rand(4 * D), D, 12)
    linear1, linear2 = dense.net[0].proj, dense.net[2]
    ffn = DenseFFN(linear1.weight, linear1.bias, linear2.weight, linear2.bias)
    values = convert_ffn(ffn, permutation, D, 12)
    sparse = SparseFFN(D, D, 12, D // 4, top_k=12, dtype=dtype)
    sparse.load_state_dict({**values, "gate.weight": torch.zeros(12, D)})
    x = torch.randn(2, 7, D, dtype=dtype)
    assert relative(sparse(x), dense(x)) < limit


def test_every_row_traces_home():
    dense = tiny_transformer(dtype=torch.float64).state_dict()
    permutations = permutations_for(dense)
    state = convert_state_dict(dense, permutations, SPEC, FLUX)
    for name, block, site in sites_of(dense, FLUX):
        fc1_w, fc1_b, fc2_w, fc2_b = read_ffn(dense.__getitem__, block, site)
        ffn = {k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")}
        assert torch.equal(ffn["neurons"], permutations[name])
        for row, neuron in enumerate(ffn["neurons"].tolist()):
            if row < D:
                assert torch.equal(ffn["shared.fc1.weight"][row], fc1_w[neuron])
                assert torch.equal(ffn["shared.fc1.bias"][row], fc1_b[neuron])
                assert torch.equal(ffn["shared.fc2.weight"][:, row], fc2_w[:, neuron])
            else:
                expert, unit = divmod(row - D, D // 4)
                assert torch.equal(ffn["experts.w1"][expert, :, unit], fc1_w[neuron])
                assert torch.equal(ffn["experts.b1"][expert, unit], fc1_b[neuron])
                assert torch.equal(ffn["experts.w2"][expert, unit], fc2_w[:, neuron] * 12)
        assert torch.equal(ffn["shared.fc2.bias"], fc2_b)
        for actual, expected in zip(unconvert_ffn(ffn), (fc1_w, fc1_b, fc2_w, fc2_b)):
            assert relative(actual, expected) < 1e-15
        for local, rest in read_rest(dense.__getitem__, block, site).items():
            assert torch.equal(state[f"{block}.{local}"], rest)


# ---------------------------------------------------------------- blocks and the whole model


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
def test_identity_of_blocks(dtype, limit, kind):
    """Image and text streams of double blocks; the joint stream of single blocks."""
    dense, sparse = pair(dtype)
    generator = torch.Generator().manual_seed(5)

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {"hidden_states": noise(2, 16, D), "encoder_hidden_states": noise(2, 8, D)}
    inputs |= {"temb": noise(2, D), "image_rotary_emb": dense.pos_embed(noise(24, 3) * 4)}
    with torch.no_grad(), unit_gates(sparse):
        for index in range(2):
            before = dense.get_submodule(f"{kind}.{index}")
            after = sparse.get_submodule(f"{kind}.{index}")
            expected_class = FluxTransformerBlock if kind[0] == "t" else FluxSingleTransformerBlock
            assert type(after) is type(before) is expected_class
            for actual, expected in zip(after(**inputs), before(**inputs)):
                assert relative(actual, expected) < limit
            # The streams' changes alone: the residual must not hide an error.
            streams = (inputs["encoder_hidden_states"], inputs["hidden_states"])
            for actual, expected, x in zip(after(**inputs), before(**inputs), streams):
                assert relative(actual - x, expected - x) < limit


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
def test_identity_of_the_whole_model(dtype, limit):
    dense, sparse = pair(dtype)
    inputs = tiny_inputs(dtype=dtype)
    assert identity_error(sparse, dense, inputs) < limit
    assert {ffn.top_k for ffn in sparse_ffns(sparse).values()} == {2}
    assert all(ffn.gate.weight.abs().max() > 0 for ffn in sparse_ffns(sparse).values())
    assert relative(sparse(**inputs).sample, dense(**inputs).sample) > 1e-3


def test_identity_error_sees_a_lost_neuron():
    dense, sparse = pair(torch.float64)
    with torch.no_grad():
        sparse.single_transformer_blocks[1].proj_mlp.experts.w2[11, -1].zero_()
    assert identity_error(sparse, dense, tiny_inputs(dtype=torch.float64)) > 1e-6


def test_small_random_gates_start_near_the_dense_model():
    dense, sparse = pair(torch.float32)
    inputs = tiny_inputs()
    with torch.no_grad():
        expected = dense(**inputs).sample
        errors = []
        for top_k in (0, 2, 12):
            set_top_k(sparse, top_k)
            errors.append(relative(sparse(**inputs).sample, expected))
    assert errors[2] < errors[1] < errors[0]


# ---------------------------------------------------------------- structure


def test_structure():
    model = sparsify(tiny_transformer(), SPEC)
    double, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    assert type(double.ff) is type(double.ff_context) is type(single.proj_mlp) is SparseFFN
    assert type(single.act_mlp) is torch.nn.Identity
    assert type(single.proj_out) is AttentionPlusFFN
    assert type(model.proj_out) is torch.nn.Linear
    assert list(sparse_ffns(model)) == [n for n, _, _ in sites_of(model.state_dict(), FLUX)]


def test_structure_agrees_with_the_values_on_the_meta_device():
    with torch.device("meta"):
        model = SparseFluxTransformer2DModel(**TRANSFORMER_CONFIG)
    dense = tiny_transformer().state_dict()
    state = convert_state_dict(dense, permutations_for(dense), SPEC, FLUX)
    model.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in model.state_dict().values())
    untouched = "transformer_blocks.0.attn.to_q.weight"
    assert state[untouched] is dense[untouched]


def test_other_ratios():
    spec = SparseSpec(num_experts=8, shared_ratio=2.0, expert_ratio=0.25, top_k=1)
    dense = tiny_transformer(dtype=torch.float64)
    state = dense.state_dict()
    permutations = {
        name: split_neurons(torch.rand(4 * D), 2 * D, 8) for name, _, _ in sites_of(state, FLUX)
    }
    sparse = sparsify(tiny_transformer(1, torch.float64), spec)
    sparse.load_state_dict(convert_state_dict(state, permutations, spec, FLUX))
    assert identity_error(sparse, dense, tiny_inputs(dtype=torch.float64)) < 1e-12


def test_missing_permutation_is_named():
    dense = tiny_transformer().state_dict()
    permutations = permutations_for(dense)
    del permutations["transformer_blocks.1.ff_context"]
    with pytest.raises(ValueError, match="for transformer_blocks.1.ff_context;"):
        convert_state_dict(dense, permutations, SPEC, FLUX)


def test_gates_depend_on_seed_and_name_alone():
    gate = gate_weight("transformer_blocks.0.ff", 12, D, 0)
    assert gate.dtype == torch.float32 and gate.shape == (12, D)
    assert torch.equal(gate, gate_weight("transformer_blocks.0.ff", 12, D, 0))
    assert not torch.equal(gate, gate_weight("transformer_blocks.1.ff", 12, D, 0))
    assert not torch.equal(gate, gate_weight("transformer_blocks.0.ff", 12, D, 1))
