"""<component>.onnx: the whole model against torch, its weights by offset, a Cast where needed."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.graph.compose import BLOCKS, compose
from runtime.files.tensors import read_header
from tests.tiny.bundle import manifest_of, program_of, relative, session
from tests.tiny.pipeline import tiny_inputs


def arrays(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The program's inputs: rotary tables in place of position ids."""
    cos, sin = model.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))
    feed = {n: t.numpy() for n, t in inputs.items() if not n.endswith("_ids")}
    return {**feed, "rope_cos": cos.numpy(), "rope_sin": sin.numpy()}


def check(model: torch.nn.Module, path: Path, limit: float = 2e-6) -> None:
    opened = session(path)
    for batch, image, text in ((1, 16, 8), (3, 25, 7)):
        inputs = tiny_inputs(batch, batch=batch, image_tokens=image, text_tokens=text)
        with torch.no_grad():
            expected = model(**inputs).sample
        (found,) = opened.run(["sample"], arrays(model, inputs))
        assert relative(found, expected) < limit


def test_dense_transformer(tiny_dense_dir: Path, tiny_dense_bundle: Path) -> None:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(tiny_dense_dir / "transformer").eval()
    check(model, tiny_dense_bundle / "transformer.onnx")


@pytest.mark.parametrize("top_k", [0, 1, 2, 4])
def test_sparse_transformer(
    tiny_sparse_dir: Path, tiny_bundle: Path, tmp_path: Path, top_k: int
) -> None:
    """Composed for every number of experts; the bundle's own file is the default's."""
    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel
    from d2m.model.surgery import set_top_k

    model = SparseFluxTransformer2DModel.from_pretrained(tiny_sparse_dir / "transformer").eval()
    set_top_k(model, top_k)
    weights = tmp_path / "transformer.safetensors"
    shutil.copyfile(tiny_bundle / "transformer.safetensors", weights)
    composed = compose(program_of(tiny_bundle, "transformer"), weights, top_k)
    onnx.save(composed, str(tmp_path / "transformer.onnx"))
    onnx.checker.check_model(str(tmp_path / "transformer.onnx"), full_check=True)
    check(model, tmp_path / "transformer.onnx")
    if top_k == manifest_of(tiny_bundle)["top_k"]:
        check(model, tiny_bundle / "transformer.onnx")


def test_structure(tiny_bundle: Path) -> None:
    """A function per type, a call per block, every initializer an offset into the safetensors."""
    path = tiny_bundle / "transformer.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    assert {f.name for f in model.functions} == {
        "embed", "double", "single", "final", "RoutedExperts",
    }  # fmt: skip
    calls = [node.op_type for node in model.graph.node if node.domain == BLOCKS]
    assert calls == ["embed", "double", "double", "single", "single", "final"]
    header = read_header(tiny_bundle / "transformer.safetensors")
    assert {tensor.name for tensor in model.graph.initializer} == set(header)
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        stored = header[tensor.name]
        assert place["location"] == "transformer.safetensors"
        assert int(place["offset"]) == stored.start and tuple(tensor.dims) == stored.shape
    assert path.stat().st_size < 200_000


def test_bfloat16_storage_runs_in_float32(tiny_bundle: Path, tmp_path: Path) -> None:
    """Half the bytes, a Cast after each weight, the values of the rounded weights."""
    from safetensors.torch import load_file

    from export.checkpoint.weights import Placed, write

    tensors = load_file(tiny_bundle / "transformer.safetensors")
    gates = {n for n in tensors if n.endswith("gate.weight")}
    placed = [
        Placed(
            n, (n,), False, tuple(t.shape), torch.float32 if n in gates else torch.bfloat16
        )
        for n, t in tensors.items()
    ]  # fmt: skip
    path = tmp_path / "transformer.safetensors"
    write(path, placed, tensors.__getitem__)
    program = program_of(tiny_bundle, "transformer")
    model = compose(program, path, 2)
    onnx.save(model, str(tmp_path / "stored.onnx"))
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert len(casts) == len(tensors) - len(gates)
    rounded = {
        n: (t if n in gates else t.bfloat16().float()).contiguous() for n, t in tensors.items()
    }
    full = tmp_path / "full"
    full.mkdir()
    rows = [Placed(n, (n,), False, tuple(t.shape), torch.float32) for n, t in rounded.items()]
    write(full / "transformer.safetensors", rows, rounded.__getitem__)
    onnx.save(compose(program, full / "transformer.safetensors", 2), str(full / "transformer.onnx"))
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "image_tokens": 9, "text_tokens": 5, "tokens": 14}
    feed = {
        name: rng.standard_normal([sizes.get(s, s) for s in spec.shape]).astype("f4")
        for name, spec in program.inputs.items()
    }
    (first,) = session(tmp_path / "stored.onnx").run(None, feed)
    (second,) = session(full / "transformer.onnx").run(None, feed)
    assert relative(first, second) < 1e-6
    assert path.stat().st_size < 0.6 * (full / "transformer.safetensors").stat().st_size
