"""A bundle's safetensors against the checkpoint they were made from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint.weights import Checkpoint, Placed, build, refuse_unknown, sources_of, write
from runtime.files.tensors import ALIGNMENT, SafeTensors, read_header


@pytest.fixture(scope="module")
def checkpoint(tiny_sparse_dir: Path) -> dict[str, torch.Tensor]:
    (path,) = (tiny_sparse_dir / "transformer").glob("*.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> SafeTensors:
    return SafeTensors(tiny_bundle / "transformer.safetensors")


def equal(found: np.ndarray, expected: torch.Tensor) -> bool:
    return found.shape == tuple(expected.shape) and np.array_equal(found, expected.numpy())


def test_linear_weights_are_transposed(
    checkpoint: dict[str, torch.Tensor], bundle: SafeTensors
) -> None:
    for name in (
        "x_embedder.weight",
        "proj_out.weight",
        "norm_out.linear.weight",
        "transformer_blocks.1.ff.shared.fc1.weight",
        "transformer_blocks.0.norm1.linear.weight",
        "single_transformer_blocks.1.proj_out.linear.weight",
        "single_transformer_blocks.0.proj_mlp.gate.weight",
    ):
        assert equal(bundle.array(name), checkpoint[name].t()), name


def test_experts_and_vectors_are_as_they_were(
    checkpoint: dict[str, torch.Tensor], bundle: SafeTensors
) -> None:
    """Expert weights are matmul-ready in the checkpoint already."""
    kept = [n for n in checkpoint if ".experts." in n or checkpoint[n].ndim == 1]
    kept = [n for n in kept if n in bundle.tensors]
    assert sum(".experts." in name for name in kept) == 3 * (2 * 2 + 2)
    assert all(equal(bundle.array(name), checkpoint[name]) for name in kept)


@pytest.mark.parametrize(
    ("whole", "parts"),
    [("to_qkv", ("to_q", "to_k", "to_v")),
     ("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))],
)  # fmt: skip
def test_queries_keys_and_values_are_concatenated(
    checkpoint: dict[str, torch.Tensor], bundle: SafeTensors, whole: str, parts: tuple[str, ...]
) -> None:
    stems = {n.partition("attn.")[0] + "attn." for n in checkpoint if f".{parts[0]}." in n}
    assert len(stems) == (4 if whole == "to_qkv" else 2)
    for stem in stems:
        for kind in ("weight", "bias"):
            rows = [checkpoint[f"{stem}{part}.{kind}"] for part in parts]
            expected = torch.cat(rows)
            expected = expected.t() if kind == "weight" else expected
            assert equal(bundle.array(f"{stem}{whole}.{kind}"), expected)


def test_nothing_is_lost(checkpoint: dict[str, torch.Tensor], bundle: SafeTensors) -> None:
    """Every tensor of the checkpoint is in the bundle once, but for the neurons' indices."""
    used = [source for name in bundle.tensors for source in sources_of(name)]
    wanted = [name for name in checkpoint if not name.endswith(".neurons")]
    assert sorted(used) == sorted(wanted)
    size = sum(tensor.size for tensor in bundle.tensors.values())
    assert size == sum(checkpoint[name].numel() for name in wanted)


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "text_encoder_2", "vae_decoder"])
def test_order_and_alignment(tiny_bundle: Path, name: str) -> None:
    """Data begins aligned; sizes of whole cache lines come first, and so are aligned too."""
    rows = sorted(read_header(tiny_bundle / f"{name}.safetensors").values(), key=lambda r: r.start)
    assert rows[0].start % ALIGNMENT == 0
    whole = [(row.end - row.start) % ALIGNMENT == 0 for row in rows]
    assert whole == sorted(whole, reverse=True) and any(whole)
    assert all(row.start % ALIGNMENT == 0 for row, fits in zip(rows, whole, strict=True) if fits)
    assert all(row.start % 4 == 0 for row in rows)


def test_blocks_are_in_numerical_order(tmp_path: Path) -> None:
    from export.checkpoint.weights import order

    names = [f"blocks.{i}.{part}" for i in (10, 2, 0) for part in ("b", "a")]
    rows = [Placed(name, (name,), False, (16,), torch.float32) for name in names]
    odd = Placed("a", ("a",), False, (3,), torch.float32)
    found = [row.name for row in sorted([odd, *rows], key=order)]
    assert found == [f"blocks.{i}.{part}" for i in (0, 2, 10) for part in ("a", "b")] + ["a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_writes_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """Read back by safetensors itself and by the runtime."""
    tensor = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    rows = [Placed("w", ("w",), True, (3, 5), dtype), Placed("b", ("w",), False, (5, 3), dtype)]
    path = tmp_path / "x.safetensors"
    write(path, rows, {"w": tensor}.__getitem__)
    found = load_file(path)
    assert found["w"].dtype == dtype and torch.equal(found["w"], tensor.t().to(dtype))
    assert torch.equal(found["b"], tensor.to(dtype))
    assert equal(SafeTensors(path).array("w", "float32"), tensor.t().to(dtype).float())


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    tensor = torch.zeros(5, 3)
    row = Placed("w", ("w",), False, (3, 5), torch.float32)
    with pytest.raises(ValueError, match=r"w gives \[5, 3\].*expected \[3, 5\]"):
        build(row, {"w": tensor}.__getitem__)
    with pytest.raises(FileNotFoundError, match=r"lacks \.safetensors files"):
        Checkpoint(tmp_path)
    save_file({"w": tensor, "more": tensor.clone()}, tmp_path / "model.safetensors")
    found = Checkpoint(tmp_path)
    with pytest.raises(ValueError, match="lacks the tensor absent"):
        found.get("absent")
    with pytest.raises(ValueError, match=r"1 tensors that its class does not use \(more"):
        refuse_unknown(found, [row])
    assert found.main_dtype() == torch.float32
    save_file({"w": tensor.to(torch.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="stores the tensor w as I64"):
        Checkpoint(tmp_path).dtype("w")


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"model\.safetensors is not valid safetensors"):
        Checkpoint(tmp_path)
