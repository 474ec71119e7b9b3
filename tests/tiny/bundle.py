"""What the export tests share: sessions, a bundle's weights, and its program read back."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from runtime.files.tensors import SafeTensors, read_header


def session(model: onnx.ModelProto | Path) -> ort.InferenceSession:
    """One thread, errors only."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def manifest_of(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "manifest.json").read_text())


def run_block(
    bundle: Path, component: str, kind: str, key: str, prefix: str, inputs: dict[str, np.ndarray]
) -> list[np.ndarray]:
    """One block of a bundle, its weights fed as graph inputs."""
    record = manifest_of(bundle)["components"][component]
    row = record["types"][kind]
    tensors = SafeTensors(bundle / record["weights"])
    feed = {name: inputs[name] for name in row["inputs"]}
    feed |= {n: tensors.array(prefix + n, s["dtype"]) for n, s in row["weights"].items()}
    opened = session(bundle / row["graphs"][key])
    assert [o.name for o in opened.get_outputs()] == ["out_" + name for name in row["outputs"]]
    names = [value.name for value in opened.get_inputs()]
    assert names[: len(row["inputs"])] == row["inputs"]
    assert set(names) == {*row["inputs"], *row["weights"]}  # at top_k 0 too: one signature
    return opened.run(None, feed)


def program_of(bundle: Path, component: str) -> Any:
    """The component's Program, from its manifest and block graphs."""
    import torch

    from export.checkpoint.weights import PARTS
    from export.graph.program import BlockType, Program
    from export.graph.trace import Spec

    def specs(rows: dict[str, Any]) -> dict[str, Spec]:
        return {n: Spec(getattr(torch, r["dtype"]), tuple(r["shape"])) for n, r in rows.items()}

    record = manifest_of(bundle)["components"][component]
    types = {}
    for name, row in record["types"].items():
        weights = specs(row["weights"])
        # In a transformer every matrix of rank 2 is a Linear's.
        linears = {n for n, s in weights.items() if len(s.shape) == 2}
        graphs = {key: onnx.load(str(bundle / path)) for key, path in row["graphs"].items()}
        environment = dict.fromkeys(row["inputs"]), dict.fromkeys(row["outputs"])
        types[name] = BlockType(name, *environment, weights, frozenset(linears), graphs)
    assert PARTS  # q, k, v are read back from the same names
    calls = [(call["type"], call["prefix"]) for call in record["program"]]
    return Program(types, calls, specs(record["inputs"]), specs(record["outputs"]))


def damaged(bundle: Path, root: Path, tensor: str) -> Path:
    """A copy with one tensor of the transformer scaled by 1.01, its hash put right."""
    shutil.copytree(bundle, root)
    path = root / "transformer.safetensors"
    place, data = read_header(path)[tensor], bytearray(path.read_bytes())
    assert place.dtype == "F32"
    values = np.frombuffer(bytes(data[place.start : place.end]), np.float32) * np.float32(1.01)
    data[place.start : place.end] = values.tobytes()
    path.write_bytes(data)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"]["transformer.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def relative(found: np.ndarray, expected: Any) -> float:
    """|found - expected| / |expected|"""
    expected = np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
