"""Routing statistics: figures by hand, and collected from a running model."""

import json
import math

import pytest
import torch

from calib.measure.routing import routing_statistics, routing_table
from d2m.model.surgery import set_top_k, sparse_ffns, sparsify
from d2m.recipe.recipe import SparseSpec
from tests.tiny.pipeline import tiny_inputs, tiny_transformer


def batches(step, batch_size):
    inputs = tiny_inputs(seed=step, batch=batch_size)
    return inputs | {"latents": inputs["hidden_states"]}


def model_of(seed=0):
    torch.manual_seed(seed)
    return sparsify(tiny_transformer(seed), SparseSpec())


def test_by_hand():
    # Token gates: (1/2, 1/4, 1/4) twice and (1/4, 1/2, 1/4), top 1.
    logits = torch.tensor([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.0, 2.0, 1.0]]).log()
    figures = routing_statistics(logits[None], 1)
    assert figures["tokens"] == 3
    assert figures["load"] == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-6)
    assert figures["gate"] == pytest.approx([5 / 12, 4 / 12, 3 / 12], abs=1e-6)
    assert figures["token_entropy"] == pytest.approx(1.5 * math.log(2) / math.log(3), abs=1e-6)
    assert figures["dead"] == 1 and figures["busiest"] == pytest.approx(2)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(3)
    assert figures["entropy"] == pytest.approx(entropy)


def test_extremes():
    collapsed = torch.zeros(50, 12)
    collapsed[:, 4] = 100.0
    figures = routing_statistics(collapsed, 1)
    assert figures["load"][4] == 1 and figures["dead"] == 11
    assert figures["entropy"] == figures["token_entropy"] == 0
    uniform = torch.zeros(60, 12)
    for token in range(60):
        uniform[token, token % 12] = 1e-3
    figures = routing_statistics(uniform, 1)
    assert figures["dead"] == 0 and figures["entropy"] == pytest.approx(1)
    assert figures["token_entropy"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="hold no token"):
        routing_statistics(torch.zeros(0, 12), 1)


def test_table_of_a_model():
    model = model_of()
    table = routing_table(model, batches, count=2, batch_size=2, edges=(0.0, 0.5, 1.0))
    assert table["top_k"] == 2 and table["edges"] == [0.0, 0.5, 1.0]
    assert list(table["layers"]) == list(sparse_ffns(model))
    for name, layer in table["layers"].items():
        tokens = {"ff": 16, "ff_context": 8, "proj_mlp": 24}[name.rsplit(".", 1)[1]] * 2 * 2
        assert [bucket["tokens"] for bucket in layer["buckets"]] == [tokens, tokens]
        assert layer["all"]["tokens"] == 2 * tokens
        mean = [sum(pair) / 2 for pair in zip(*(b["load"] for b in layer["buckets"]))]
        assert layer["all"]["load"] == pytest.approx(mean, abs=1e-5)
        assert sum(layer["all"]["gate"]) == pytest.approx(1, abs=1e-4)
    again = routing_table(model, batches, count=2, batch_size=2, edges=(0.0, 0.5, 1.0))
    assert again == table


def test_buckets_are_the_times_asked_for():
    model, times = model_of(), []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(kwargs["timestep"].tolist()), with_kwargs=True
    )
    routing_table(model, batches, count=1, batch_size=2, edges=(0.0, 0.2, 1.0))
    handle.remove()
    assert times == [pytest.approx([0.05, 0.15]), pytest.approx([0.4, 0.8])]


def test_model_is_left_as_it_was_even_after_an_error():
    model = model_of()
    set_top_k(model, 1)

    def failing(step, batch_size):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        routing_table(model, failing, top_k=3)
    for ffn in sparse_ffns(model).values():
        assert (ffn.top_k, ffn.record, ffn.last_logits) == (1, False, None)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="no routed experts"):
        routing_table(tiny_transformer(), batches)
    with pytest.raises(ValueError, match="top_k is 0"):
        routing_table(model_of(), batches, top_k=0)
    with pytest.raises(ValueError, match="do not rise"):
        routing_table(model_of(), batches, edges=(0.0, 0.5, 0.5))


def test_layers_of_skipped_blocks():
    """Tokens of a group are shared out over its blocks; a block that nobody chose has none."""
    from d2m.model.block_group import block_groups
    from tests.tiny.pair import grouped_pair, tiny_batches

    model, _ = grouped_pair()
    router = block_groups(model)["transformer_blocks.1"].router
    for parameter in router.parameters():
        parameter.data.zero_()  # ties go to the first block
    layers = routing_table(model, tiny_batches, top_k=2, count=1, batch_size=4)["layers"]
    assert layers["transformer_blocks.1.ff"]["all"]["tokens"] == 4 * 4 * 16
    nothing = layers["transformer_blocks.2.ff"]["all"]
    assert nothing["tokens"] == 0 and nothing["load"] == [0.0] * 12 and nothing["dead"] == 12
    both = [layers[f"single_transformer_blocks.{i}.proj_mlp"]["all"]["tokens"] for i in (0, 1)]
    assert sum(both) == 4 * 4 * 24
    assert all(ffn.last_logits is None for ffn in sparse_ffns(model).values())


def test_positions_and_blocks_of_a_model_with_groups():
    """What the table says of blocks is what the blocks were called with."""
    from d2m.model.block_group import block_groups
    from tests.tiny.pair import grouped_pair, tiny_batches

    model, _ = grouped_pair()
    kinds = torch.tensor([0, 1, 1, 0])

    def sorted_batches(step, batch_size):
        return tiny_batches(step, batch_size) | {"category": kinds[:batch_size]}

    group = block_groups(model)["transformer_blocks.1"]
    called = dict.fromkeys(group.blocks, 0)
    for name, block in group.blocks.items():

        def count(module, args, kwargs, name=name):
            called[name] += kwargs["hidden_states"].shape[0]

        block.register_forward_pre_hook(count, with_kwargs=True)
    options = {"top_k": 2, "count": 2, "batch_size": 4, "categories": ("a", "b")}
    table = routing_table(model, sorted_batches, **options)
    assert list(table["groups"]) == list(block_groups(model))
    found = table["groups"]["transformer_blocks.1"]
    assert found["all"] == {"samples": 32, "share": [round(n / 32, 4) for n in called.values()]}
    assert [found["categories"][name]["samples"] for name in "ab"] == [16, 16]
    assert [bucket["samples"] for bucket in found["buckets"]] == [8] * 4
    assert all(
        not each.record and each.last_logits is None for each in block_groups(model).values()
    )

    where = table["positions"]
    assert (where["rows"], where["columns"]) == (4, 4)
    assert not any(name.endswith("ff_context") for name in where["layers"])
    for name, layer in where["layers"].items():
        assert len(layer["share"]) == 12 and 0 <= layer["information"] <= 1
        sums = [sum(expert[cell] for expert in layer["share"]) for cell in range(16)]
        assert sums == pytest.approx([1.0] * 16, abs=1e-3), name
    assert json.loads(json.dumps(table)) == table

    with pytest.raises(ValueError, match="the batches have no 'category', but 2 categories"):
        routing_table(model, tiny_batches, **options)
