"""Gated FFNs of diffusers' own blocks made sparse: exact, forward untouched, every row traced."""

import pytest
import torch
from torch import nn

from d2m.families.ffn_sites import read_ffn, read_rest, sites_of
from d2m.model.routing import activate
from d2m.model.sparse_ffn import AttentionPlusFFN, ProjectionBesideFFN
from d2m.model.surgery import set_top_k, sparse_ffns, sparsify, unit_gates
from d2m.recipe.recipe import hidden_sizes
from tests.cases.gated_blocks import (
    CASES,
    SPEC,
    answers,
    converted,
    family_of,
    flux2_double,
    layers,
    relative,
)


@pytest.mark.parametrize("case", CASES)
def test_all_experts_on_are_the_dense_block(case):
    dense, sparse, values, given, _, _ = converted(case)
    sparse.load_state_dict(values)
    assert set(values) == set(sparse.state_dict())
    for before, after in zip(dense.layers, sparse.layers):
        assert type(after) is type(before) and "forward" not in vars(after)
        with torch.no_grad():
            expected = answers(before, given)
            with unit_gates(sparse):
                found = answers(after, given)
            changed = answers(after, given)
        streams = [given[k] for k in ("encoder_hidden_states", "hidden_states", "x") if k in given]
        streams = [stream for stream in streams if stream is not None]
        for one, other, third, x in zip(found, expected, changed, streams, strict=True):
            # The change alone: the residual must not hide an error.
            assert relative(one - x, other - x) < 1e-12
            assert relative(third - x, other - x) > 1e-3  # top 2 of 12


@pytest.mark.parametrize("case", CASES)
def test_every_row_traces_home(case):
    dense, _, values, _, family, orders = converted(case)
    state = dense.state_dict()
    for name, block, site in sites_of(state, family):
        ffn = read_ffn(state.__getitem__, block, site)
        N, own = ffn.neurons, {k: v for k, v in values.items() if k.startswith(f"{name}.")}
        own = {k.removeprefix(f"{name}."): v for k, v in own.items()}
        shared, hidden = hidden_sizes(N, SPEC)
        assert (shared, hidden) == (N // 4, N // 16)
        for row, neuron in enumerate(orders[name].tolist()):
            gate, value, column = ffn.fc1_w[neuron], ffn.fc1_w[N + neuron], ffn.fc2_w[:, neuron]
            if row < shared:
                assert torch.equal(own["shared.fc1.weight"][row], gate)
                assert torch.equal(own["shared.fc1.weight"][shared + row], value)
                assert torch.equal(own["shared.fc2.weight"][:, row], column)
            else:
                expert, unit = divmod(row - shared, hidden)
                assert torch.equal(own["experts.w1"][expert, :, unit], gate)
                assert torch.equal(own["experts.w1"][expert, :, hidden + unit], value)
                assert torch.equal(own["experts.w2"][expert, unit], column * 12)
                if ffn.fc1_b is not None:
                    pair = own["experts.b1"][expert, [unit, hidden + unit]]
                    assert torch.equal(pair, ffn.fc1_b[[neuron, N + neuron]])
        assert ("shared.fc2.bias" in own) == (ffn.fc2_b is not None)
        for local, rest in read_rest(state.__getitem__, block, site).items():
            assert torch.equal(values[f"{block}.{local}"], rest)
    untouched = set(state) & set(values)
    assert all(values[key].data_ptr() == state[key].data_ptr() for key in untouched)


@pytest.mark.parametrize("case", CASES)
def test_read_ffn_is_what_the_block_computes(case):
    """The tensors that conversion reads, against the hidden states inside the real block."""
    make, bias, neurons = CASES[case]
    _, given, sites = make(bias)
    dense = layers(make, bias, 0)
    state = dense.state_dict()
    for name, block, site in sites_of(state, family_of(sites)):
        first, second = (inputs_of(dense, block, linear, given) for linear in (site.fc1, site.fc2))
        ffn = read_ffn(state.__getitem__, block, site)
        rows = first @ ffn.fc1_w.T + (0 if ffn.fc1_b is None else ffn.fc1_b)
        hidden = activate(rows, site.activation)
        assert ffn.neurons == neurons == hidden.shape[-1]
        assert relative(hidden, second[..., -neurons:]) < 1e-12, name


def inputs_of(model, block, linear, given):
    """What reaches a Linear when its block runs."""
    seen = []
    own = model.get_submodule(block)
    keep = own.get_submodule(linear).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), keep:
        own(**given)
    return seen[0]


def test_what_stands_in_a_single_block():
    _, sparse, values, given, family, _ = converted("FLUX.2 single")
    attention = sparse.layers[0].attn
    assert type(attention.to_qkv_mlp_proj) is ProjectionBesideFFN
    assert type(attention.to_out) is AttentionPlusFFN
    assert type(attention.mlp_act_fn) is nn.Identity
    assert (attention.mlp_hidden_dim, attention.mlp_mult_factor) == (32, 1)
    assert list(sparse_ffns(sparse)) == [name for name, _, _ in sites_of(values, family)]
    sparse.load_state_dict(values)
    with torch.no_grad():
        set_top_k(sparse, 0)
        alone = sparse.layers[0](**given)
        set_top_k(sparse, 12)
        assert relative(sparse.layers[0](**given), alone) > 1e-3


def test_a_state_dict_goes_round(tmp_path):
    from safetensors.torch import load_file, save_file

    for case, (make, bias, _) in CASES.items():
        _, sparse, values, given, family, _ = converted(case)
        sparse.load_state_dict(values)
        save_file({k: v.contiguous() for k, v in sparse.state_dict().items()}, tmp_path / "m.st")
        again = sparsify(layers(make, bias, 5), SPEC, family)
        again.load_state_dict(load_file(tmp_path / "m.st"))
        with torch.no_grad():
            for one, other in zip(again.layers, sparse.layers):
                pairs = zip(answers(one, given), answers(other, given))
                assert all(torch.equal(a, b) for a, b in pairs)


def test_one_bias_alone_is_refused():
    model, family = layers(flux2_double, False, 0), family_of(flux2_double(False)[2])
    model.layers[0].ff.linear_out.bias = nn.Parameter(torch.zeros(32, dtype=torch.float64))
    with pytest.raises(ValueError, match="ff.linear_in and ff.linear_out have no and a bias"):
        sparsify(model, SPEC, family)


@pytest.mark.parametrize(
    ("neurons", "sizes"), [(9216, (2304, 576)), (10240, (2560, 640)), (12288, (3072, 768))]
)
def test_a_quarter_is_shared_whatever_the_ratio(neurons, sizes):
    """1S12E2A of FLUX.2 [klein] 4B (D 3072), Z-Image (D 3840) and FLUX.1 (D 3072)."""
    assert hidden_sizes(neurons, SPEC) == sizes
