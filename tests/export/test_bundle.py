"""The exported bundle: valid ONNX that ONNX Runtime runs alone, equal to torch, reproducible."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from d2m.model.sparse_transformer import SparseFluxTransformer2DModel
from d2m.model.surgery import set_top_k
from export.bundle import export_bundle
from runtime.files.tensors import SafeTensors, read_header
from tests.conftest import exported
from tests.tiny.pipeline import tiny_inputs

ROOT = Path(__file__).resolve().parent.parent.parent
COMPONENTS = ("text_encoder", "text_encoder_2", "transformer", "vae_decoder", "vae_encoder")
CHOICES = (0, 1, 2, 4)


def session(path: Path) -> ort.InferenceSession:
    """Plain ONNX Runtime: no custom library, no execution provider but the CPU's."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def relative(found: np.ndarray, expected: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    reference = expected.detach().float().numpy()
    assert found.shape == reference.shape and np.abs(reference).max() > 1e-3
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def sparse_model(directory: Path) -> Any:
    return SparseFluxTransformer2DModel.from_pretrained(directory / "transformer").eval()


def feed(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A transformer's keyword inputs as the bundle's transformer.onnx takes them."""
    tensors = {name: value for name, value in inputs.items() if not name.endswith("_ids")}
    cos, sin = model.pos_embed(torch.cat((inputs["txt_ids"], inputs["img_ids"])))
    tensors |= {"rope_cos": cos, "rope_sin": sin}
    return {name: value.float().numpy() for name, value in tensors.items()}


def manifest(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return found


def files(directory: Path) -> dict[str, str]:
    """Relative path -> sha256 of everything in a directory."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------- valid ONNX


def test_every_graph_is_valid(tiny_bundle: Path, tiny_dense_bundle: Path) -> None:
    for bundle, kinds in ((tiny_bundle, 2 * 4 + 2), (tiny_dense_bundle, 4)):
        graphs = sorted(bundle.rglob("*.onnx"))
        assert len(graphs) == 5 + kinds + 4, graphs  # components whole; encoders and VAE by blocks
        for path in graphs:
            onnx.checker.check_model(str(path))
            domains = {
                entry.domain for entry in onnx.load(path, load_external_data=False).functions
            }
            assert domains <= {"d2m", "d2m.blocks"}


@pytest.mark.parametrize("name", COMPONENTS)
def test_initializers_lie_in_the_safetensors(tiny_bundle: Path, name: str) -> None:
    """By offset and length, with the header's shape and type: no second copy of any weight."""
    model = onnx.load(tiny_bundle / f"{name}.onnx", load_external_data=False)
    weights = tiny_bundle / f"{name}.safetensors"
    header = read_header(weights)
    kinds = {"F32": onnx.TensorProto.FLOAT, "BF16": onnx.TensorProto.BFLOAT16}
    assert model.graph.initializer
    for tensor in model.graph.initializer:
        assert tensor.data_location == onnx.TensorProto.EXTERNAL and not tensor.raw_data
        place = {entry.key: entry.value for entry in tensor.external_data}
        row = header[tensor.name]
        assert place["location"] == weights.name
        assert (int(place["offset"]), int(place["length"])) == (row.start, row.end - row.start)
        assert tuple(tensor.dims) == tuple(row.shape) and tensor.data_type == kinds[row.dtype]
    assert (tiny_bundle / f"{name}.onnx").stat().st_size < 600_000


# ---------------------------------------------------------------- equal to torch


@pytest.fixture(scope="module")
def pairs(
    tiny_sparse_dir: Path, tiny_bundle: Path, tiny_dense_dir: Path, tiny_dense_bundle: Path
) -> dict[str, tuple[Any, ort.InferenceSession]]:
    """kind -> torch's model and ONNX Runtime's."""
    from diffusers import FluxTransformer2DModel

    dense = FluxTransformer2DModel.from_pretrained(tiny_dense_dir / "transformer").eval()
    return {
        "sparse": (sparse_model(tiny_sparse_dir), session(tiny_bundle / "transformer.onnx")),
        "dense": (dense, session(tiny_dense_bundle / "transformer.onnx")),
    }


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize(("batch", "image_tokens", "text_tokens"), [(1, 16, 8), (3, 25, 5)])
def test_transformer_equals_torch(
    pairs: dict[str, tuple[Any, ort.InferenceSession]],
    kind: str,
    batch: int,
    image_tokens: int,
    text_tokens: int,
) -> None:
    model, run = pairs[kind]
    inputs = tiny_inputs(batch * 7, None, batch, image_tokens, text_tokens)
    with torch.no_grad():
        expected = model(**inputs).sample
    (found,) = run.run(["sample"], feed(model, inputs))
    assert relative(found, expected) < 1e-5


def captured(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Name of every block -> its keyword inputs and its outputs (text, image)."""
    seen: dict[str, Any] = {}
    hooks = [
        block.register_forward_hook(
            lambda _, args, kwargs, result, name=f"{group}.{index}.": seen.update(
                {name: (args, kwargs, result)}
            ),
            with_kwargs=True,
        )
        for group in ("transformer_blocks", "single_transformer_blocks")
        for index, block in enumerate(getattr(model, group))
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("top_k", CHOICES)
def test_block_graphs_equal_torch_blocks(
    tiny_bundle: Path, tiny_sparse_dir: Path, top_k: int
) -> None:
    """Every block alone, through the graph of each top_k, its weights as graph inputs."""
    model = sparse_model(tiny_sparse_dir)
    set_top_k(model, top_k)
    row = manifest(tiny_bundle)["components"]["transformer"]
    weights = SafeTensors(tiny_bundle / "transformer.safetensors")
    blocks = captured(model, tiny_inputs(11, None, 2, 9, 6))
    sessions: dict[str, ort.InferenceSession] = {}
    assert [call["prefix"] for call in row["program"] if call["prefix"]] == list(blocks)
    for call in row["program"]:
        kind, prefix = call["type"], call["prefix"]
        if not prefix:
            continue
        graph = row["types"][kind]["graphs"][str(top_k)]
        run = sessions.setdefault(graph, session(tiny_bundle / graph))
        args, kwargs, (text, image) = blocks[prefix]
        values = dict(zip(("hidden_states", "encoder_hidden_states", "temb"), args)) | kwargs
        cos, sin = values["image_rotary_emb"]
        values |= {"rope_cos": cos, "rope_sin": sin}
        tensors = {
            name: values[name].numpy()
            if name in row["types"][kind]["inputs"]
            else weights.array(prefix + name, "float32")
            for name in (value.name for value in run.get_inputs())
        }
        names = ["out_encoder_hidden_states", "out_hidden_states"]
        found = run.run(names, tensors)
        assert relative(found[0], text) < 1e-5, prefix
        assert relative(found[1], image) < 1e-5, prefix


def test_top_k_matters(tiny_bundle: Path, tiny_sparse_dir: Path) -> None:
    """The test above would be empty if all numbers of experts gave the same."""
    model, inputs = sparse_model(tiny_sparse_dir), tiny_inputs(11, None, 1)
    with torch.no_grad():
        two = model(**inputs).sample
        for top_k in (0, 1, 4):
            set_top_k(model, top_k)
            assert relative(model(**inputs).sample.numpy(), two) > 1e-3
    (found,) = session(tiny_bundle / "transformer.onnx").run(None, feed(model, inputs))
    assert relative(found, two) < 1e-5  # the default of the checkpoint


# ---------------------------------------------------------------- the manifest, and reproducibility


def test_the_manifest_lists_every_file(tiny_bundle: Path) -> None:
    found = manifest(tiny_bundle)
    actual = files(tiny_bundle)
    del actual["manifest.json"]
    assert {name: row["sha256"] for name, row in found["files"].items()} == actual
    for name, row in found["files"].items():
        assert row["size"] == (tiny_bundle / name).stat().st_size
    assert found["kind"] == "sparse" and found["num_experts"] == 12
    assert found["top_k"] == 2 and found["top_k_choices"] == list(CHOICES)
    assert found["storage_dtype"] == found["compute_dtype"] == "float32"


@pytest.mark.slow
def test_the_same_bytes_from_another_process(
    tiny_sparse_dir: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Another process with another hash seed; nothing may follow a set's order or the clock."""
    program = "import sys; from export.bundle import export_bundle as e; e(*sys.argv[1:])"
    out = tmp_path / "elsewhere"
    subprocess.run(
        [sys.executable, "-c", program, str(tiny_sparse_dir), str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345"},
        check=True,
        capture_output=True,
    )
    assert files(out) == files(tiny_bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    for path in out.rglob("*"):
        if path.suffix in (".onnx", ".json"):
            assert str(ROOT).encode() not in path.read_bytes()


@pytest.fixture(scope="module")
def small(tiny_sparse_dir: Path, pytestconfig: pytest.Config) -> Path:
    """A second export, with weights stored in bfloat16."""
    return exported(pytestconfig, tiny_sparse_dir, top_k=(2,), storage="bf16")


def test_two_exports_have_the_same_graphs(small: Path, tiny_bundle: Path) -> None:
    """Block graphs and tokenizers do not depend on storage: two traces give the same bytes."""
    one, two = files(tiny_bundle), files(small)
    same = [name for name in two if name.startswith(("blocks/", "tokenizer"))]
    # double and single, embed and final, encoders and VAE's both, tokenizers
    assert len(same) == 2 + 2 + 4 + 2
    assert all(one[name] == two[name] for name in same)


def test_bf16_storage_halves_the_weights(
    small: Path, tiny_sparse_dir: Path, tiny_bundle: Path
) -> None:
    """Stored in bfloat16, computed in float32: torch with rounded weights gives the same."""
    for name in COMPONENTS:
        header = read_header(small / f"{name}.safetensors")
        data = sum(row.end - row.start for row in header.values())
        full = sum(row.end - row.start for row in read_header(
            tiny_bundle / f"{name}.safetensors").values())  # fmt: skip
        gates = sum(row.end - row.start for n, row in header.items() if n.endswith("gate.weight"))
        assert data - gates == (full - gates) / 2
        assert all((row.dtype == "F32") == n.endswith("gate.weight") for n, row in header.items())
    found = manifest(small)
    assert found["compute_dtype"] == "float32"
    assert found["storage_dtype"] == "bfloat16"
    model = sparse_model(tiny_sparse_dir)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("gate.weight"):
                parameter.copy_(parameter.bfloat16().float())
        inputs = tiny_inputs(5, None, 2)
        expected = model(**inputs).sample
    (sample,) = session(small / "transformer.onnx").run(None, feed(model, inputs))
    assert sample.dtype == np.float32
    assert relative(sample, expected) < 1e-5


# ---------------------------------------------------------------- what is refused


def one_sentence(error: pytest.ExceptionInfo[Any]) -> None:
    text = str(error.value)
    assert "\n" not in text and "expected" in text


def test_refuses_what_is_no_pipeline(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for source in (empty, tmp_path / "absent"):
        with pytest.raises((FileNotFoundError, ValueError), match=source.name) as error:
            export_bundle(source, tmp_path / "out")
        one_sentence(error)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_refuses_more_experts_than_there_are(tiny_sparse_dir: Path, tmp_path: Path) -> None:
    for wrong in (13, -1):
        with pytest.raises(ValueError, match=rf"{wrong}.*from 0 to 12") as error:
            export_bundle(tiny_sparse_dir, tmp_path / "out", top_k=(1, wrong))
        one_sentence(error)
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_no_plan_can_be_built_for_is_refused_before_tracing(
    tiny_sparse_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import export.checkpoint.pipeline

    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(
        export.checkpoint.pipeline, "open_components", None
    )  # what loads and traces
    for portable in (False, True):
        with pytest.raises(ValueError, match="--sm is 90, expected some of 75") as error:
            export_bundle(
                tiny_sparse_dir, tmp_path / "out", trt_rtx=True, sm=(86, 90), portable=portable
            )
        one_sentence(error)
    assert not list(tmp_path.iterdir())


def test_refuses_to_overwrite_what_is_no_bundle(tiny_sparse_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no bundle") as error:
        export_bundle(tiny_sparse_dir, out)
    one_sentence(error)
    with pytest.raises(ValueError, match="is a file") as error:
        export_bundle(tiny_sparse_dir, out / "thesis.txt")
    one_sentence(error)
    assert files(tmp_path) == {"out/thesis.txt": hashlib.sha256(b"mine").hexdigest()}


def test_a_failed_export_leaves_nothing(
    tiny_dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    import export.bundle as module

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "new_manifest", full)
    with pytest.raises(OSError, match="disk of .* is full") as error:
        export_bundle(tiny_dense_dir, tmp_path / "out")
    one_sentence(error)
    assert not list(tmp_path.iterdir())
