"""What was hashed is what is used: files that are replaced after a bundle was opened."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle import directory
from runtime.bundle.directory import open_bundle
from runtime.pipeline import Pipeline

Generate = Callable[[Any], Any]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def replace(path: Path) -> None:
    """Another file of the same size and time takes the name: the last byte differs."""
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)


def generate(bundle: Any, mode: str | None = None) -> np.ndarray:
    pipeline = Pipeline(bundle, "ort", threads=1, mode=mode)
    return np.asarray(pipeline("a red circle", steps=1, output_type="np"))


@pytest.mark.parametrize("mode", ["graph", "blocks"])
def test_weights_that_are_replaced_change_nothing(bundle: Path, mode: str) -> None:
    expected = generate(bundle, mode)
    opened = open_bundle(bundle)
    for path in bundle.glob("*.safetensors"):
        replace(path)
    assert np.array_equal(generate(opened, mode), expected)
    with pytest.raises(ValueError, match=r"safetensors has SHA-256 .*, expected another"):
        generate(bundle, mode)


def test_weights_that_are_replaced_before_they_are_opened_are_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = directory.check_weights

    def late(opened: Any, component: str) -> None:
        if component == "transformer":
            replace(bundle / "transformer.safetensors")
        real(opened, component)

    monkeypatch.setattr(directory, "check_weights", late)
    with pytest.raises(ValueError, match="it was replaced after its hash was checked"):
        open_bundle(bundle)


@pytest.mark.parametrize("pattern", ["*.onnx", "blocks/**/*.onnx", "tokenizer*/*.json"])
def test_graphs_and_tokenizers_that_are_replaced_are_refused(bundle: Path, pattern: str) -> None:
    opened = open_bundle(bundle)
    paths = [path for path in bundle.glob(pattern) if path.name != "manifest.json"]
    assert paths
    for path in paths:
        replace(path)
    with pytest.raises(ValueError, match=r"has SHA-256 .*, expected another"):
        generate(opened, "blocks" if "blocks" in pattern else "graph")


def test_plans_and_kernels_are_read_with_their_hash(bundle: Path) -> None:
    opened = open_bundle(bundle)
    name = next(name for name in opened.manifest["files"] if name.endswith(".onnx"))
    assert opened.read(name) == (bundle / name).read_bytes()
    replace(bundle / name)
    with pytest.raises(ValueError, match="expected another"):
        opened.read(name)
    with pytest.raises(ValueError, match="has more than 10 bytes"):
        opened.read(name, 10)


def test_a_link_out_of_it_names_the_cure(bundle: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("transformer.safetensors", "manifest.json"):
        os.replace(bundle / name, blobs / name)
        (bundle / name).symlink_to(f"../blobs/{name}")
        with pytest.raises(ValueError, match=r"is a link that leaves .* cp -rL .*bundle NEW"):
            open_bundle(bundle)
    copy = tmp_path / "NEW"
    shutil.copytree(bundle, copy)  # follows links, as cp -rL does
    assert open_bundle(copy).name
