"""The kernels compiled ahead of time, without a GPU, and what their machine code must be like."""

import pytest

from d2m.kernels.configs import SHARED_LIMIT
from tests.cases import kernels as cases

MATMULS = ("up", "down", "hidden_backward", "dx", "dw1", "dw2")
# The matrix instruction of every architecture: anything else is a slower path.
MATRIX = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def assert_good(found: dict, sm: int, dtype: str = "bf16") -> None:
    assert found
    for label, code in found.items():
        assert code["spills"] == code["local"] == code["stack"] == 0, (label, code)
        assert code["shared"] <= SHARED_LIMIT[sm], (label, code)
        # Registers of one program: more than 65,536 cannot start.
        assert code["registers"] * 32 * code["warps"] <= 65_536, (label, code)
        if label in MATMULS:
            assert code["wide"] >= 8, (label, code)
            if dtype != "fp32":
                assert code["mma"] and all(op.startswith(MATRIX[sm]) for op in code["mma"])
        if label.startswith("combine"):
            assert code["wide"] >= 2, (label, code)


def test_image_stream_on_hopper(compiled):
    """Everything forward and backward runs, at FLUX's sizes, on wgmma with 16-byte copies."""
    found = compiled(cases.machine_code, 90, 4096)
    assert set(found) >= {"route", "place", "up", "combine", "gate_backward", *MATMULS}
    assert_good(found, 90)
    # Two programs of `up` to an SM: 228 kB of shared memory (1 kB of it reserved for each).
    assert 2 * (found["up"]["shared"] + 1024) <= 233_472
    assert 2 * found["up"]["registers"] * 32 * found["up"]["warps"] <= 65_536
    assert found["down"]["mma"].keys() == {"HGMMA.64x256x16.F32.BF16"}


def test_text_stream_on_hopper(compiled):
    assert_good(compiled(cases.machine_code, 90, 512, "bf16", ("up", "down")), 90)


@pytest.mark.parametrize("sm", [80, 89, 100, 120])
def test_image_stream_elsewhere(compiled, sm):
    assert_good(compiled(cases.machine_code, sm, 4096, "bf16", ("up", "hidden_backward")), sm)


KLEIN = (3072, 12, 576, 2)  # FLUX.2 [klein] 4B: FFNs of 9216


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_gated_experts(compiled, sm):
    """SwiGLU without biases, of both streams: two accumulators forward, three backward."""
    labels = ("up", "hidden_backward")
    for tokens in (4096, 512):
        found = compiled(cases.machine_code, sm, tokens, "bf16", labels, KLEIN, ("swiglu", False))
        assert_good(found, sm)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", [("swiglu", False), ("geglu", True), ("silu", False)])
def test_other_activations_everywhere(compiled, sm, dtype, kind):
    for tokens in (512, 4096):
        for sizes in (KLEIN, (3840, 12, 640, 2)):  # Z-Image: FFNs of 10240
            found = compiled(cases.machine_code, sm, tokens, dtype, (), sizes, kind)
            assert_good(found, sm, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("tokens", [512, 4096])
def test_everything_everywhere(compiled, sm, dtype, tokens):
    assert_good(compiled(cases.machine_code, sm, tokens, dtype), sm, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(128, 12, 32, 2), (1152, 12, 288, 4), (100, 5, 24, 3)])
def test_other_models(compiled, sizes):
    """The shapes model, a PixArt-sized one, and one that no tile divides."""
    for tokens in (64, 4096):
        found = compiled(cases.machine_code, 90, tokens, "bf16", (), sizes)
        assert all(code["spills"] == code["stack"] == 0 for code in found.values())


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_every_number_of_experts_stays_in_registers(compiled, top_k):
    """Generic stores to the stack are no STL: the stack itself must be empty."""
    found = compiled(
        cases.machine_code, 90, 4096, "bf16", ("route", "place"), (3072, 12, 768, top_k)
    )
    assert_good(found, 90)


def test_experts_that_no_tile_divides_do_not_spill(compiled):
    """H = 288: masks beside two accumulators of 128 columns took 86 spills."""
    labels = ("hidden_backward",)
    assert_good(compiled(cases.machine_code, 90, 4096, "bf16", labels, (1152, 12, 288, 4)), 90)


def test_ptx_for_a_driver_or_a_plugin(compiled):
    ptx, parameters, scratch = compiled(cases.ptx_of_up, 87)
    assert ".version 8.7" in ptx and ".target sm_90a" in ptx
    names = "x w1 b1 slot_token slot_gate tile_expert tile_rows hidden".split()
    assert [name for name, _ in parameters] == names
    assert scratch == 2
