"""The targets of scripts.fuzz: bytes that came from outside, and the function that
reads them.

JSON that is almost right is what reaches deep, and random bytes hardly ever are JSON. So the JSON
targets read their bytes in two ways: as a text where they begin with "{" or "[", else as a list of
changes to a text that is right, four bytes each: which place, what to do, and a value.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.bundle import kernel_package as kernels
from runtime.bundle import manifest
from runtime.bundle import onnx_file as onnxfile
from runtime.bundle import tokenizer_file as vocabulary
from runtime.files.checked_json import parse_json
from runtime.files.tensors import parse_header
from runtime.tokenizer import TextTokenizer

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent.parent / "runtime/default"
FILES = {"w.safetensors": 56}
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, 1e308, "", "x", "../x", "\ud800",
    "\x1b[2J", "a" * 2000, [], {}, [[]], [1, 2, 3], {"": None}, ["x"] * 300, "Replace", "Sequence",
    "Split", "Precompiled", "Unigram", "BPE", "float32", "T", "9*T", "f.onnx", "f.safetensors",
)  # fmt: skip


def changed(data: bytes, right: Any) -> Any:
    """A right value with changes: of four bytes each, the first two say where."""
    value = copy.deepcopy(right)
    for start in range(0, min(len(data), 64), 4):
        one, two, what, junk = data[start : start + 4].ljust(4, b"\0")
        place, key, number = value, None, one << 8 | two
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            number, rest = divmod(number, len(keys))
            parent, key = place, keys[rest]
            place = place[key]
            if number == 0:
                break
        if key is None:
            continue
        if what % 4 == 0:
            parent[key] = copy.deepcopy(JUNK[junk % len(JUNK)])
        elif what % 4 == 1 and isinstance(parent, dict):
            parent[JUNK[junk % len(JUNK)] if isinstance(JUNK[junk % len(JUNK)], str) else "k"] = 1
        elif what % 4 == 2:
            del parent[key]
        elif isinstance(parent, list):
            parent.extend(parent[: junk % 9])
    return value


def text_of(data: bytes, right: Any) -> bytes:
    """The JSON text that some bytes stand for."""
    if data[:1] in (b"{", b"["):
        return data
    return json.dumps(changed(data, right)).encode()


def small_manifest() -> dict[str, Any]:
    """A manifest that is right, with one component's worth of everything."""
    kind = {
        "graphs": {"": "f.onnx"}, "inputs": ["a"], "outputs": ["b"],
        "weights": {"w": {"dtype": "float32", "shape": [2, 2]}},
    }  # fmt: skip
    tensor = {"dtype": "float32", "shape": ["batch", 4]}
    component = {
        "onnx": "f.onnx", "weights": "f.safetensors", "inputs": {"a": tensor},
        "outputs": {"b": tensor}, "types": {"t": kind}, "program": [{"type": "t", "prefix": ""}],
    }  # fmt: skip
    transformer = {**component, "inputs": {
        "a": tensor, "hidden_states": {"dtype": "float32", "shape": ["batch", 16]}}}  # fmt: skip
    routed = {**kind, "graphs": {"1": "f.onnx", "2": "f.onnx"}, "body": "tiles"}
    plan = {
        "api": "tensorrt_rtx", "version": "1.7", "compute_capabilities": [89], "files": {
            "transformer/t.k1": "f.onnx"}, "profiles": {"batch": [1, 1, 4]}, "tensors": {
            "transformer/t.k1": {}, "e": {"inputs": ["x", "l", "w", "b", "v"]}},
        "experts": {"e": {"top_k": 2, "kernels": "kernels"}},
        "segments": {"t": ["e", "transformer/t.k1"]},
    }  # fmt: skip
    names = ("f.onnx", "f.safetensors", "t.json", "kernels/kernels.json")
    found = json.loads((DEFAULT / "manifest.json").read_text())
    kept = ("format", "family", "kind", "compute_dtype", "storage_dtype", "d2m", "name", "latents",
            "defaults", "scheduler")  # fmt: skip
    return {key: found[key] for key in kept} | {
        "num_experts": 12, "top_k": 2, "top_k_choices": [1, 2], "plans": {"p": plan},
        "files": {name: {"sha256": "0" * 64, "size": 8} for name in names},
        "components": dict.fromkeys(manifest.FAMILIES["flux"].components, component)
        | {"transformer": {**transformer, "types": {"t": routed}}},
        "tokenizers": dict.fromkeys(
            ("tokenizer", "tokenizer_2"), {"file": "t.json", "max_length": 16, "pad_id": 1}
        ),
    }  # fmt: skip


def small_kernels() -> dict[str, Any]:
    """A manifest of kernels that is right."""
    kernel = {"entry": "k", "cubin": "k.cubin", "block": 128, "shared": 0, "scratch": 0,
              "parameters": [["x", "*fp32"], ["y", "*fp32"], ["n", "i32"]]}  # fmt: skip
    value: dict[str, Any] = {
        "format": 1, "triton": "3.6", "dtype": "fp32", "width": 8, "experts": 2, "hidden": 4,
        "files": {"k.cubin": {"sha256": "0" * 64, "size": 8}}, "kernels": {"k": kernel},
    }  # fmt: skip
    launch = {"kernel": "k", "grid": ["T", 1], "arguments": ["x", "y", "2*T"]}
    plan = {"sm": 89, "top_k": 1, "block_m": 16, "block_t": 16, "tokens": [1, None], "work": {},
            "launches": [launch]}  # fmt: skip
    return value | {"plans": [plan | kernels.op_shapes(value)]}


MANIFEST, KERNELS = small_manifest(), small_kernels()
TOKENIZERS = [
    json.loads((DEFAULT / name / "tokenizer.json").read_text())
    for name in ("tokenizer", "tokenizer_2")
]


def run_manifest(data: bytes) -> None:
    manifest.check(parse_json(text_of(data, MANIFEST)))


def run_kernels(data: bytes) -> None:
    kernels.check(parse_json(text_of(data, KERNELS)))


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}


def run_header(data: bytes) -> None:
    text = text_of(data, HEADER)
    found = parse_header(Path("x"), text, 8 + len(text) + 22)
    assert sum(t.end - t.start for t in found.values()) == 22


def run_onnx(data: bytes) -> None:
    onnxfile.check_onnx(data, FILES)


def run_tokenizer(data: bytes) -> None:
    right = TOKENIZERS[data[-1] % 2 if data else 0]
    vocabulary.check(parse_json(text_of(data, right)))


def run_library(data: bytes) -> None:
    """A changed tokenizer that passes is opened by the tokenizers library, and reads a prompt."""
    which = data[-1] % 2 if data else 0
    path = (
        Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"d2m-fuzz-{os.getpid()}.json"
    )
    path.write_bytes(text_of(data, TOKENIZERS[which]))
    try:
        tokenizer = TextTokenizer("tokenizer", path, {"max_length": 64, "pad_id": 1})
        tokenizer(["a photo of\0 a red\u00e9 circle \U0001f600  aaaaaaaaaaaaaaaa"])
    finally:
        path.unlink()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": run_manifest,
    "kernels": run_kernels,
    "header": run_header,
    "onnx": run_onnx,
    "tokenizer": run_tokenizer,
    "library": run_library,
}


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with: accepted ones, and changes of them."""
    changes = [bytes([i, j, k, i * 7 % 251]) for i in range(6) for j in (0, 3) for k in range(4)]
    if target == "onnx":
        return [path.read_bytes() for path in sorted((HERE / "onnx").glob("*.onnx"))]
    right = {"manifest": MANIFEST, "kernels": KERNELS, "header": HEADER}.get(target)
    whole = [json.dumps(right).encode()] if right else []
    return [b"", *whole, *changes]
