"""The embedded bundle, quantised without its pipeline: sparse, with groups of blocks."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.requantise import quantise_bundle
from runtime.files.tensors import SafeTensors
from runtime.ort.blocks import Blocks
from runtime.pipeline import Pipeline

DEFAULT = Path(__file__).parents[2] / "runtime" / "default"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("requantise") / "int8"
    quantise_bundle(DEFAULT, out, quant="int8", keep=["transformer_blocks.0"])
    return out


def test_every_block_is_nearly_what_it_was(bundle: Path) -> None:
    """Held and whole, weights mapped as they are stored; what is kept is the same to the byte."""
    generator, held = np.random.default_rng(0), Pipeline(bundle, "ort").bundle
    pair = [Blocks(each, "transformer", 1) for each in (Pipeline(DEFAULT, "ort").bundle, held)]
    seen: dict[str, float] = {}
    calls = zip(*(each.component["program"] for each in pair), strict=True)
    for call, twin in calls:
        row: dict[str, Any] = pair[0].component["types"][call["type"]]
        shapes = {"temb": (1, 128), "rope_cos": (32, 32), "rope_sin": (32, 32)}
        inputs = {
            name: generator.standard_normal(shapes.get(name, (1, 16, 128))).astype(np.float32)
            for name in row["inputs"]
        }
        if call["prefix"]:
            exact, found = (
                each.block(one["type"], one["prefix"], inputs)
                for each, one in zip(pair, (call, twin))
            )
            errors = [np.linalg.norm(found[n] - exact[n]) / np.linalg.norm(exact[n]) for n in exact]
            seen[call["prefix"]] = float(max(errors))
    assert seen.pop("transformer_blocks.0.") == 0
    assert len(seen) > 5 and min(seen.values()) > 1e-4 and max(seen.values()) < 0.05
    stored = SafeTensors(bundle / "transformer.safetensors").tensors
    kinds = {row.dtype for name, row in stored.items() if name.endswith(("w1", "w2"))}
    assert kinds == {"I8", "BF16"}
    mapped = [array for (name, dtype), array in pair[1].place.weights.items() if dtype == "int8"]
    assert mapped and all(not array.flags.owndata for array in mapped)  # views of the file


def test_its_image_is_nearly_the_same(bundle: Path) -> None:
    pictures = [
        np.asarray(Pipeline(each, "ort", mode=mode)("a red circle", steps=4, seed=1), np.float32)
        for each, mode in ((DEFAULT, "graph"), (bundle, "graph"), (bundle, "blocks"))
    ]
    # Whole and block by block: a last bit may send a number, or a token's expert, the other way.
    assert np.abs(pictures[1] - pictures[2]).mean() < 0.2
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 3


def test_what_it_is_and_what_is_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["quant"]["format"] == "int8" and manifest["plans"] == {}
    assert manifest["quant"]["keep"] == ["transformer_blocks.0"]
    again = quantise_bundle(DEFAULT, tmp_path / "b", quant="int8", keep=["transformer_blocks.0"])
    assert again["bytes"] < 0.8 * sum(f.stat().st_size for f in DEFAULT.rglob("*") if f.is_file())
    hashes = [
        hashlib.sha256((root / "transformer.safetensors").read_bytes()).hexdigest()
        for root in (bundle, tmp_path / "b")
    ]
    assert hashes[0] == hashes[1]
    with pytest.raises(ValueError, match="is int8, expected one .* export the pipeline again"):
        quantise_bundle(bundle, tmp_path / "c", quant="int4")
    with pytest.raises(ValueError, match="leaves no weight to quantise"):
        quantise_bundle(DEFAULT, tmp_path / "c", quant="int4", keep=["*"])
    assert not (tmp_path / "c").exists()
