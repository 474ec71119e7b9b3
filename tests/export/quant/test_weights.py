"""Weights to each format and back, against what the format's definition says."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export.quant.activations import rounded
from export.quant.formats import FORMATS, INT8_MAX, format_of
from export.quant.weights import fp4_bits, fp4_values, pack, shapes, unpack
from runtime.files.quantised import float8
from runtime.files.tensors import SafeTensors, shapes_of

# Largest relative error of a Gaussian matrix of 64 rows: the format's step, by the largest number
# of a column or block.
ERRORS = {"int8": 0.014, "int4": 0.09, "fp8": 0.03, "nvfp4": 0.105}


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_comes_back_within_the_formats_step(name: str) -> None:
    kind, generator = FORMATS[name], torch.Generator().manual_seed(0)
    for shape in ((64, 48), (3, 64, 32)):
        weight = torch.randn(shape, generator=generator) * torch.rand(
            shape[-1], generator=generator
        )
        parts = pack(kind, weight)
        found = {suffix: tuple(part.shape) for suffix, part in parts.items()}
        assert found == shapes(kind, shape)
        types = {suffix: str(part.dtype).removeprefix("torch.") for suffix, part in parts.items()}
        assert types == kind.parts
        error = (unpack(kind, parts) - weight).norm() / weight.norm()
        assert ERRORS[name] / 3 < error < ERRORS[name]
        # What is on the grid stays on it, and nothing but zeros is nothing but zeros.
        again = unpack(kind, pack(kind, unpack(kind, parts)))
        if name in ("fp8", "nvfp4"):
            assert (again - unpack(kind, parts)).abs().max() < 1e-5
        assert not unpack(kind, pack(kind, torch.zeros(shape))).any()


def test_int8_never_overflows_sixteen_bits() -> None:
    """Two products of 8 by 8 bits are added up in 16 by CPUs without VNNI."""
    whole = pack(FORMATS["int8"], torch.randn(256, 64, generator=torch.Generator().manual_seed(1)))[
        ""
    ]
    assert whole.abs().max() == INT8_MAX and 2 * 255 * INT8_MAX < 1 << 15


def test_int4_is_better_than_plain_rounding() -> None:
    kind, weight = FORMATS["int4"], torch.randn(64, 40, generator=torch.Generator().manual_seed(2))
    blocks = weight.t().reshape(40, 2, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    plain = ((blocks / scale).round() * scale - blocks).norm()
    assert (unpack(kind, pack(kind, weight)) - weight).norm() < 0.9 * plain


def test_the_runtime_reads_the_same_numbers(tmp_path: Path) -> None:
    """Where a GPU does not multiply a format, weights are dequantised on their way there."""
    generator = torch.Generator().manual_seed(5)
    tensors, expected = {}, {}
    for name, kind in FORMATS.items():
        weight = torch.randn(2, 64, 48, generator=generator)
        parts = pack(kind, weight if kind.of_experts is kind else weight[0])
        tensors |= {f"{name}{suffix}": part.contiguous() for suffix, part in parts.items()}
        expected[name] = unpack(kind, parts)
    save_file(tensors, tmp_path / "w.safetensors")
    opened = SafeTensors(tmp_path / "w.safetensors")
    for name, whole in expected.items():
        found = opened.array(name, "float32")
        assert found.shape == tuple(whole.shape) and np.allclose(found, whole, rtol=1e-6)
        half = opened.array(name, "bfloat16")
        assert np.array_equal(half, whole.bfloat16().view(torch.int16).numpy().view(np.uint16))
        assert opened.size_as(name, "bfloat16") == whole.numel()
    counted = shapes_of(opened.tensors)  # as parameters are counted: without scales
    assert counted == {name: tuple(whole.shape) for name, whole in expected.items()}
    raw = opened.array("nvfp4", "float4_e2m1")
    assert raw.nbytes == opened.size_as("nvfp4", "float4_e2m1") == 64 * 48 // 2
    floats = np.arange(256, dtype=np.uint8)
    own = torch.from_numpy(floats).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(float8(floats), own, equal_nan=True)


def test_four_bit_floats_are_those_of_ml_dtypes() -> None:
    generator = torch.Generator().manual_seed(3)
    edges = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 0.0])
    values = torch.cat([torch.randn(1000, generator=generator) * 3, edges, -edges])
    expected = values.numpy().astype(ml_dtypes.float4_e2m1fn)
    found = fp4_bits(values)
    assert np.array_equal(fp4_values(found).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_a_tokens_rounding_depends_on_that_token_alone(name: str) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    alone = torch.cat([rounded(FORMATS[name], row) for row in x.split(1)])
    assert torch.equal(rounded(FORMATS[name], x), alone)
    assert torch.isfinite(rounded(FORMATS[name], torch.zeros(2, 32))).all()
    limit = {"int4": 0, "int8": 0.01, "fp8": 0.04, "nvfp4": 0.15}[name]
    assert (rounded(FORMATS[name], x) - x).norm() <= limit * x.norm()


def test_formats_by_name() -> None:
    assert format_of("none") is None and format_of("fp8") is FORMATS["fp8"]
    with pytest.raises(ValueError, match="--quant is 'int3', expected one of none, int8"):
        format_of("int3")
