"""The kernels in Triton's interpreter against the reference in float64, forward and backward.

Scratch and outputs are poisoned and fenced in every case.
"""

import pytest

from d2m.families.site import ACTIVATIONS
from tests.cases import kernels as cases

LIMITS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
ROUTINGS = ("one expert", "skewed", "ties", "all equal", "huge", "very negative")


def assert_close(result: dict, limit: float) -> None:
    assert result.pop("choice")
    assert all(error < limit for error in result.values()), result


@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
def test_random_routing(interpreted, top_k):
    # D and H that no tile divides: every mask is at work.
    result = interpreted(cases.check_values, (21, 40, 6, 24), top_k, twice=top_k == 2)
    assert_close(result, LIMITS["float32"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_bfloat16(interpreted, activation, bias):
    """On the text stream's own tiles (float32: tests/test_op.py)."""
    kind = (activation, bias)
    result = interpreted(cases.check_values, (40, 64, 6, 64), 2, "bfloat16", small=False, kind=kind)
    assert_close(result, LIMITS["bfloat16"])


@pytest.mark.parametrize("sizes", [(1, 32, 12, 16), (2, 16, 2, 16)])
def test_few_tokens_of_gated_experts(interpreted, sizes):
    result = interpreted(cases.check_values, sizes, 2, kind=("swiglu", False))
    if sizes[2] == 2:
        result.pop("dlogits")  # every expert is chosen
    assert_close(result, LIMITS["float32"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision(interpreted, dtype):
    result = interpreted(cases.check_values, (24, 48, 6, 32), 2, dtype)
    assert_close(result, LIMITS[dtype])


@pytest.mark.parametrize("routing", [*ROUTINGS, "minus infinity", "alternating"])
def test_adversarial_routing(interpreted, routing):
    result = interpreted(cases.check_values, (24, 32, 6, 16), 2, routing=routing)
    assert_close(result, LIMITS["float32"])


@pytest.mark.parametrize("sizes", [(1, 32, 12, 16), (2, 16, 1, 16), (17, 16, 5, 16)])
def test_odd_sizes(interpreted, sizes):
    result = interpreted(cases.check_values, sizes, min(2, sizes[2]))
    if sizes[2] == 1:
        # One expert: the gate is 1 whatever the logits, and their gradient 0 up to rounding.
        assert result.pop("dlogits") < 1e30
    assert_close(result, LIMITS["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_text_streams_own_tiles(interpreted, dtype):
    result = interpreted(cases.check_values, (150, 128, 12, 64), 2, dtype, "skewed", small=False)
    assert_close(result, LIMITS[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_image_streams_own_tiles(interpreted, dtype):
    result = interpreted(cases.check_values, (2100, 128, 12, 128), 2, dtype, "skewed", small=False)
    assert_close(result, LIMITS[dtype])


def test_no_tokens(interpreted):
    shapes = interpreted(cases.check_no_tokens)["shapes"]
    assert shapes == [[0, 32], [0, 32], [0, 12], [12, 32, 16], [12, 16], [12, 16, 32]]


@pytest.mark.parametrize("where", ["x", "logits"])
def test_a_bad_token_spoils_no_other(interpreted, where):
    assert interpreted(cases.check_bad_numbers, where) == {"first": True, "others": True}


@pytest.mark.parametrize("routing", ["random", "one expert", "ties", "alternating"])
def test_placement(interpreted, routing):
    for sizes, top_k, rows in (((50, 6), 2, 16), ((33, 12), 4, 32)):
        found = interpreted(cases.check_placement, sizes, top_k, routing, rows)
        assert found["used"] <= found["bound"]


def test_the_fused_end_of_a_block(interpreted):
    assert interpreted(cases.check_residual)["y"] < LIMITS["float32"]


def test_autograd_checkpointing_and_compile(interpreted):
    found = interpreted(cases.check_through_torch)
    assert found["plain"] < 2e-6 and found["compile"] < 1e-6
    assert found["checkpoint"] and found["strided"]
    assert found["autocast"] == "torch.bfloat16"
