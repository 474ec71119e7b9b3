"""Which realisation of the routed op runs, that it is said, and that all of them mean the same."""

import logging
from dataclasses import replace

import pytest
import torch

from d2m.model.experts_choice import REALISATIONS, Case, choose, functions, use
from d2m.model.experts_op import experts_op
from d2m.model.routing import routed_experts_reference

H200 = Case("cuda", 90, torch.bfloat16, 3072, 768, True, False)


@pytest.mark.parametrize(
    ("change", "expected", "reason"),
    [
        ({}, "triton", "the fastest there is"),
        ({"sm": 80, "dtype": torch.float16}, "triton", "the fastest there is"),
        ({"has_triton": False}, "grouped_mm", "triton is not installed"),
        ({"has_triton": False, "sm": 80}, "sorted", "waits for the counts"),
        ({"has_triton": False, "hidden": 6}, "sorted", "not whole 16 bytes"),
        ({"sm": 75}, "sorted", "older than sm_80"),
        ({"dtype": torch.float64}, "sorted", "float64 is not float32"),
        ({"device": "cpu", "sm": 0}, "sorted", "the tensors are on cpu"),
        ({"device": "cpu", "sm": 0, "interpreted": True}, "sorted", "for tests"),
        ({"device": "mps", "sm": 0}, "sorted", "on mps"),
    ],
)
def test_the_choice_and_its_reason(change, expected, reason, caplog):
    choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="d2m"):
        assert choose(replace(H200, **change), "", "D2M_EXPERTS") == expected
        assert choose(replace(H200, **change), "", "D2M_EXPERTS") == expected
    [record] = caplog.records
    assert f": {expected} (" in record.getMessage() and reason in record.getMessage()


def test_by_hand(monkeypatch, caplog):
    x, logits = torch.randn(3, 16), torch.randn(3, 4)
    weights = torch.randn(4, 16, 8), torch.randn(4, 8), torch.randn(4, 8, 16)
    choose.cache_clear()
    monkeypatch.setenv("D2M_EXPERTS", "grouped_mm")
    with caplog.at_level(logging.INFO, logger="d2m"):
        experts_op(x, logits, *weights, 2)
        with use("sorted"):
            experts_op(x, logits, *weights, 2)
    said = [record.getMessage() for record in caplog.records]
    assert "grouped_mm, because D2M_EXPERTS says so" in said[0]
    assert "sorted, because use() says so" in said[1]
    monkeypatch.setenv("D2M_EXPERTS", "fast")
    with pytest.raises(ValueError, match="D2M_EXPERTS.*'fast'.*triton, grouped_mm, sorted"):
        experts_op(x, logits, *weights, 2)


def test_what_cannot_be_done_is_an_error():
    with pytest.raises(ValueError, match="D2M_EXPERTS asks for .*'triton' but .*on cpu"):
        choose(replace(H200, device="cpu", sm=0), "triton", "D2M_EXPERTS")
    with pytest.raises(ValueError, match="'grouped_mm' but .*float64"):
        choose(replace(H200, dtype=torch.float64), "grouped_mm", "use()")


def test_every_name_has_its_functions():
    for name in REALISATIONS:
        forward, backward = functions(name)
        assert forward.__name__.startswith("forward") and backward.__name__.startswith("backward")


@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize("skew", [0.0, 50.0])
def test_grouped_mm_matches_the_reference(tokens, skew):
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 16), (tokens, 12), (12, 16, 8), (12, 8), (12, 8, 16))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    values[1][:, 0] += skew
    results = []
    for call in ("grouped_mm", "reference"):
        leaves = [v.clone().requires_grad_() for v in values]
        if call == "grouped_mm":
            with use("grouped_mm"):
                y = experts_op(*leaves, 3)
                y.square().sum().backward()
        else:
            y = routed_experts_reference(*leaves, 3)
            y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results):
        assert actual.shape == expected.shape
        if actual.numel():
            assert (actual - expected).norm() <= 1e-5 * expected.norm() + 1e-6
