"""All bodies of d2m::RoutedExperts against the definition of the op in float64."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from d2m.families.site import up_rows
from d2m.model.routing import routed_experts_reference
from export.op.bodies import BODIES, Routing, body, tile_rows, with_body
from export.op.body_lines import few
from export.op.schema import OP
from tests.cases.experts import KINDS
from tests.cases.onnx_experts import bare_model, session

E, D, H = 12, 16, 4


def bare(top_k: int, dtype: int = TensorProto.FLOAT, **kind: Any) -> onnx.ModelProto:
    return bare_model(top_k, (D, E, H), dtype, **kind)


def weights(
    seed: int = 0, activation: str = "gelu_tanh", bias: bool = True
) -> dict[str, np.ndarray]:
    rng, wide = np.random.default_rng(seed), H * up_rows(activation)
    made = {
        "w1": rng.standard_normal((E, D, wide)).astype("f4") / 4,
        "b1": rng.standard_normal((E, wide)).astype("f4") / 4,
        "w2": rng.standard_normal((E, H, D)).astype("f4") / 2,
    }
    return {name: value for name, value in made.items() if bias or name != "b1"}


def routings(tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random router logits, and the ones that break naive bodies."""
    rng = np.random.default_rng(seed)
    random = rng.standard_normal((tokens, E)).astype("f4") * 2
    one = np.tile(-np.arange(E, dtype="f4"), (tokens, 1))
    last = np.full((tokens, E), -60, "f4")
    last[:, -1] = 60
    return {
        "random": random,
        "everyone to the same experts": one,
        "everyone to the last, the others' gates vanish": last,
        "all equal": np.zeros((tokens, E), "f4"),
        "ties": np.round(random),
        "pairs of ties": np.repeat(random[:, : E // 2], 2, axis=1),
    }


def expected(
    x: np.ndarray, logits: np.ndarray, top_k: int, activation: str = "gelu_tanh", bias: bool = True
) -> np.ndarray:
    tensors = {"x": x, "logits": logits, **weights(0, activation, bias)}
    doubles = {name: torch.from_numpy(value).double() for name, value in tensors.items()}
    doubles.setdefault("b1", None)
    return routed_experts_reference(**doubles, top_k=top_k, activation=activation).numpy()


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("top_k", range(1, E + 1))
def test_bodies_are_the_reference(kind: str, top_k: int) -> None:
    """Every k, dynamic T down to one token, random and adversarial routings."""
    run = session(with_body(bare(top_k), kind, tile=4))
    for tokens in (1, 2, 7, 64):
        x = np.random.default_rng(tokens).standard_normal((tokens, D)).astype("f4")
        for name, logits in routings(tokens, seed=tokens).items():
            (y,) = run.run(None, {"x": x, "logits": logits, **weights()})
            reference = expected(x, logits, top_k)
            error = np.abs(y - reference).max() / np.abs(reference).max()
            assert y.shape == x.shape
            assert error < 2e-6, (name, tokens, error)


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_bodies_of_every_activation(kind: str, activation: str, bias: bool) -> None:
    """float16, and float32 of no token and one (of many: tests/test_op.py)."""
    held = weights(0, activation, bias)
    for dtype, numpy, counts in (
        (TensorProto.FLOAT, "f4", (0, 1)),
        (TensorProto.FLOAT16, "f2", (0, 1, 40)),
    ):
        run = session(with_body(bare(2, dtype, activation=activation, bias=bias), kind, tile=4))
        given = {name: value.astype(numpy) for name, value in held.items()}
        for tokens in counts:
            rng = np.random.default_rng(tokens)
            x = rng.standard_normal((tokens, D)).astype(numpy)
            logits = rng.standard_normal((tokens, E)).astype("f4")
            (y,) = run.run(None, {"x": x, "logits": logits, **given})
            assert y.shape == (tokens, D) and y.dtype == x.dtype
            if tokens:
                reference = expected(x.astype("f4"), logits, 2, activation, bias)
                error = np.abs(y - reference).max() / np.abs(reference).max()
                assert error < (2e-6 if numpy == "f4" else 8e-3), (numpy, tokens)


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_no_token_gives_no_row(kind: str, top_k: int, dtype: int) -> None:
    run = session(with_body(bare(top_k, dtype), kind, tile=4))
    x = np.empty((0, D), "f4" if dtype == TensorProto.FLOAT else "f2")
    halves = {name: value.astype(x.dtype) for name, value in weights().items()}
    (y,) = run.run(None, {"x": x, "logits": np.empty((0, E), "f4"), **halves})
    assert y.shape == (0, D) and y.dtype == x.dtype


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_an_expert_that_nobody_chose_has_no_say(kind: str, tokens: int, bad: float) -> None:
    """Whatever it holds; but `every` multiplies all of w2, where it must be a finite number."""
    logits = np.random.default_rng(tokens).standard_normal((tokens, E)).astype("f4")
    logits[:, 5] = -60
    x = np.random.default_rng(1).standard_normal((tokens, D)).astype("f4")
    held = weights()
    few_rows = kind == "every" or (kind == "either" and tokens <= few(Routing(E, 2, width=D)))
    for name in ("w1", "b1", "w2"):
        held[name] = held[name].copy()
        held[name][5] = 3e38 if name == "w2" and few_rows else bad
    run = session(with_body(bare(2), kind, tile=4))
    (y,) = run.run(None, {"x": x, "logits": logits, **held})
    np.testing.assert_allclose(y, expected(x, logits, 2), rtol=0, atol=3e-6)


@pytest.mark.parametrize("tile", [1, 3, 16, 256])
def test_any_tile_gives_the_same(tile: int) -> None:
    x = np.random.default_rng(1).standard_normal((50, D)).astype("f4")
    run = session(with_body(bare(2), "portable", tile=tile))
    for logits in routings(50).values():
        (y,) = run.run(None, {"x": x, "logits": logits, **weights()})
        np.testing.assert_allclose(y, expected(x, logits, 2), rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", BODIES)
def test_half_precision_accumulates_in_float(kind: str) -> None:
    run = session(with_body(bare(3, TensorProto.FLOAT16), kind, tile=4))
    x = np.random.default_rng(2).standard_normal((9, D)).astype("f2")
    logits = routings(9)["random"]
    halves = {name: value.astype("f2") for name, value in weights().items()}
    (y,) = run.run(None, {"x": x, "logits": logits, **halves})
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, expected(x.astype("f4"), logits, 3), rtol=0, atol=6e-3)


@pytest.mark.parametrize("kind", BODIES)
def test_folds_where_weights_are_initializers(kind: str) -> None:
    """The composed model's case: same values, the per-expert slices folded away."""
    model = with_body(bare(2), kind, tile=4)
    for name, value in weights().items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    kept = [value for value in model.graph.input if value.name in ("x", "logits")]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    x = np.random.default_rng(3).standard_normal((20, D)).astype("f4")
    logits = routings(20)["random"]
    (y,) = session(model).run(None, {"x": x, "logits": logits})
    np.testing.assert_allclose(y, expected(x, logits, 2), rtol=0, atol=3e-6)


def test_swapping_bodies() -> None:
    """with_body replaces, removes, and leaves the given model and models without the op alone."""
    alone = bare(2)
    first = with_body(alone, "sorted")
    assert not alone.functions
    second = with_body(first, "portable", tokens=4096)
    assert [f.name for f in second.functions] == [OP]
    assert second.functions[0] == body("portable", Routing(E, 2), tile=256)
    assert with_body(second, "sorted") == first
    assert with_body(second, None) == alone
    plain = helper.make_model(helper.make_graph([], "g", [], []))
    assert with_body(plain, "sorted") == plain


def test_few_tokens_are_those_that_were_measured() -> None:
    """At D = 128 up to 16 tokens; wide models and unknown widths have the sorted body alone."""
    assert [few(Routing(E, 2, width=width)) for width in (16, 128, 256, 512, 1024)] == [
        24, 16, 8, 4, 0,
    ]  # fmt: skip
    assert few(Routing(E, 2)) == 0
    for width in (0, 1024):
        plain = body("either", Routing(E, 2, width=width))
        assert plain == body("sorted", Routing(E, 2))


def test_either_has_both_branches() -> None:
    """So the tests above run both: the limit at D = 16, K = 2 is 24 tokens, they try 7 and 64."""
    (function,) = with_body(bare(2), "either").functions
    (node,) = [node for node in function.node if node.op_type == "If"]
    names = [{n.op_type for n in attribute.g.node} for attribute in node.attribute]
    assert [a.name for a in node.attribute] == ["then_branch", "else_branch"]
    assert "ScatterElements" in names[0] and "Split" in names[1]


def test_one_kind_of_experts_a_model() -> None:
    model = bare(2)
    node = onnx.NodeProto()
    node.CopyFrom(model.graph.node[0])
    node.output[0], node.attribute[0].i = "y2", 3
    model.graph.node.append(node)
    with pytest.raises(ValueError, match="one top_k"):
        with_body(model, "sorted")
    with pytest.raises(ValueError, match="expected one of sorted, every, either, portable"):
        body("dense", Routing(E, 2))


def test_tiles_follow_the_tokens() -> None:
    assert [tile_rows(t, Routing(E, 2)) for t in (1, 32, 512, 4096, 10**6)] == [
        16, 16, 32, 256, 256,
    ]  # fmt: skip
    assert tile_rows(4096, Routing(E, 1)) == 128
