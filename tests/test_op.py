"""One test that holds all realisations of d2m::RoutedExperts together, for every activation.

The same tensors go through all of them, and what comes back is held against the reference in
float64, which `tests/d2m/model/test_activations.py` holds against scalar loops. What concerns one
realisation alone (adversarial routing, no token, tiles, half types) has its tests beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.cases import kernels
from tests.cases.experts import KINDS, NAMES, make, reference, relative

T, SIZES = 23, (40, 6, 24)  # D, E, H: neither D nor H is a multiple of a kernel's tile
D, E, H = SIZES


class Case(NamedTuple):
    """Float32 tensors (b1 may be None), what comes back into y, and how they are to be used."""

    arguments: list[Any]
    dy: torch.Tensor
    top_k: int
    activation: str


class Skip(Exception):
    """A realisation that has no such experts."""


Answer = tuple[torch.Tensor, list[Any] | None]  # y, and gradients where it has any


def sorted_loop(case: Case, child: Any) -> Answer:
    from d2m.model.sorted_loop import backward_sorted, forward_sorted

    wide = [None if a is None else a.double() for a in case.arguments]
    y = forward_sorted(*wide, case.top_k, activation=case.activation)
    options: Any = {"activation": case.activation}
    return y, [*backward_sorted(case.dy.double(), *wide, case.top_k, True, True, **options)]


def grouped_mm(case: Case, child: Any) -> Answer:
    from d2m.model.grouped_mm import backward_grouped, forward_grouped

    y = forward_grouped(*case.arguments, case.top_k, activation=case.activation)
    options: Any = {"activation": case.activation}
    return y, [*backward_grouped(case.dy, *case.arguments, case.top_k, True, True, **options)]


def triton(case: Case, child: Callable[..., Any]) -> Answer:
    """In its interpreter; scratch and outputs are poisoned and fenced."""
    y, gradients = child(kernels.realise, *case)
    return y, gradients


def body(kind: str) -> Callable[[Case, Any], Answer]:
    """A body of standard ONNX operators, in ONNX Runtime."""

    def run(case: Case, child: Any) -> Answer:
        from export.op.bodies import with_body
        from tests.cases.onnx_experts import bare_model, session

        given = {n: a.numpy() for n, a in zip(NAMES, case.arguments) if a is not None}
        bias = "b1" in given
        bare = bare_model(case.top_k, SIZES, activation=case.activation, bias=bias)
        (y,) = session(with_body(bare, kind, tile=4)).run(None, given)
        return torch.from_numpy(y), None

    return run


def microsoft_moe(case: Case, child: Any) -> Answer:
    from tests.cases.onnx_experts import MOE, microsoft_model, session

    if case.activation not in MOE:
        raise Skip("com.microsoft.MoE has no such activation")
    given = {name: a.numpy() for name, a in zip(NAMES, case.arguments) if a is not None}
    run = session(microsoft_model(case.activation, case.top_k, given), check=False)
    (y,) = run.run(None, {name: given[name] for name in ("x", "logits")})
    return torch.from_numpy(y), None


class Way(NamedTuple):
    run: Callable[[Case, Any], Answer]
    limit: float
    top_k: tuple[int, ...] = (1, 2, E)


# What `export` may choose among, and what training does.
WAYS = {
    "sorted loop": Way(sorted_loop, 1e-12),
    "grouped_mm": Way(grouped_mm, 2e-6),
    "Triton": Way(triton, 2e-6, (2,)),
    **{f"body {kind}": Way(body(kind), 2e-6) for kind in ("sorted", "every", "either", "portable")},
    "com.microsoft.MoE": Way(microsoft_moe, 2e-6, (2,)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_all_ways_are_the_reference(
    way: str, activation: str, bias: bool, request: pytest.FixtureRequest
) -> None:
    """Values, and gradients of those that have them, with K = 1, 2 and E."""
    child = request.getfixturevalue("interpreted") if way == "Triton" else None
    if way.startswith(("body", "com")):
        pytest.importorskip("onnxruntime")
    for top_k in WAYS[way].top_k:
        arguments = make(activation, bias, T, torch.float32, top_k, SIZES)
        dy = torch.randn(T, D, generator=torch.Generator().manual_seed(7))
        expected, gradients = reference(arguments, top_k, activation, dy)
        try:
            y, found = WAYS[way].run(Case(arguments, dy, top_k, activation), child)
        except Skip as reason:
            pytest.skip(str(reason))
        assert y.shape == expected.shape and relative(y, expected) < WAYS[way].limit
        for name, own, other in zip(NAMES, found or [], gradients, strict=bool(found)):
            if other is None:
                assert own is None or own.numel() == 0
            else:
                assert relative(own, other) < 10 * WAYS[way].limit, (name, top_k)


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("top_k", "activation", "bias"),
    [(1, "gelu_tanh", True), (E, "gelu_tanh", True), *((2, *kind) for kind in KINDS)],
)
def test_plans_of_all_kinds(top_k: int, activation: str, bias: bool) -> None:
    """A TensorRT-RTX plan of the portable body alone: no copy to the host and no conditional."""
    from onnx import TensorProto

    from export.op.bodies import with_body
    from export.plans.compiler import build, load_api
    from export.plans.layers import check_plan, layers
    from tests.cases.onnx_experts import bare_model

    bare = bare_model(top_k, SIZES, TensorProto.BFLOAT16, activation, bias)
    model = with_body(bare, "portable", tile=16)
    sizes = {name: ((1, size), (32, size), (64, size)) for name, size in (("x", D), ("logits", E))}
    _, dump = build(load_api(), model, sizes, sm=(), name="routed")
    check_plan("routed", layers(dump))


def test_all_bodies_are_here() -> None:
    from export.op.bodies import BODIES

    assert [f"body {kind}" for kind in BODIES] == [way for way in WAYS if way.startswith("body")]
    assert np.isfinite([way.limit for way in WAYS.values()]).all()
