"""Knobs turned while drawing: per call, per step, restored; wrong numbers named beforehand."""

import numpy as np
import pytest
import torch

from d2m.generate import generate_with
from d2m.model.block_group import block_groups
from d2m.model.knobs import knobs
from d2m.model.surgery import sparse_ffns
from tests.tiny.pair import grouped_pair, tiny_pair
from tests.tiny.pipeline import build_pipeline, tiny_transformer

SIZE = {"height": 16, "width": 16, "max_sequence_length": 16}


def numbers(model):
    return (
        {ffn.top_k for ffn in sparse_ffns(model).values()},
        {group.kappa for group in block_groups(model).values()},
    )


@pytest.fixture(scope="module")
def pipe():
    pipe = build_pipeline()
    pipe.register_modules(transformer=grouped_pair()[0])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_step_has_its_own_numbers(pipe):
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args: seen.append(numbers(module))
    )
    draw = generate_with(
        pipe, batch_size=1, num_inference_steps=3, top_k=[4, 0, 12], kappa=[2, 1, 1], **SIZE
    )
    draw(["a ring", "a cross"], [0, 1])
    handle.remove()
    assert seen == [({4}, {2}), ({0}, {1}), ({12}, {1})] * 2
    assert numbers(pipe.transformer) == ({2}, {1})


def test_one_number_is_as_setting_it(pipe):
    def picture(**turned):
        draw = generate_with(pipe, num_inference_steps=2, **turned, **SIZE)
        return np.asarray(draw(["a ring"], [0])[0])

    from d2m.model.sparse_transformer import set_top_k

    one = picture(top_k=0)
    assert np.array_equal(one, picture(top_k=[0, 0]))
    set_top_k(pipe.transformer, 0)
    assert np.array_equal(one, picture())
    set_top_k(pipe.transformer, 2)
    assert not np.array_equal(one, picture())


def test_restored_after_an_error():
    model = grouped_pair()[0]
    with pytest.raises(RuntimeError), knobs(model, 2, top_k=[1, 0], kappa=2):
        assert numbers(model) == ({1}, {2})
        raise RuntimeError
    assert numbers(model) == ({2}, {1})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"top_k": [1, 2]}, "top_k has 2 numbers for 3 denoising steps"),
        ({"top_k": [1, 2, 13]}, "top_k=13 is out of range"),
        ({"kappa": 3}, "kappa=3 is out of range"),
    ],
)
def test_wrong_numbers(pipe, values, words):
    with pytest.raises(ValueError, match=words):
        generate_with(pipe, num_inference_steps=3, **values)
    assert numbers(pipe.transformer) == ({2}, {1})


def test_knobs_that_are_not_there():
    with pytest.raises(ValueError, match="kappa is 1 but the model has no groups of blocks"):
        with knobs(tiny_pair()[0], 2, kappa=1):
            pass
    with pytest.raises(ValueError, match="top_k is 1 but the model has no experts"):
        with knobs(tiny_transformer(), 2, top_k=1):
            pass
    assert torch.is_grad_enabled()
