"""`d2m export --link`: shards taken as they are become hard links; the bundle is the same model."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from calib.measure.importance import magnitudes
from d2m.convert.streamed import convert_stream
from d2m.recipe import recipe as recipes
from export.bundle import export_bundle
from export.checkpoint import shared_shards as links
from export.checkpoint.weights import Checkpoint, Placed, write
from export.graph.compose import compose
from runtime.bundle.directory import open_bundle
from tests.tiny.bundle import manifest_of, program_of, session


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def streamed(tiny_dense_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = dataclasses.replace(recipes.preset("L"), stages=(), split="magnitude")
    out = tmp_path_factory.mktemp("streamed") / "sparse"
    convert_stream(tiny_dense_dir, out, recipe, magnitudes, "magnitude", log=quiet)
    return out


@pytest.fixture(scope="module")
def linked(streamed: Path) -> Path:
    out = streamed.parent / "linked"
    answer = export_bundle(streamed, out, top_k=(2,), link=True)
    assert 0 < answer["linked_bytes"] < answer["bytes"]
    return out


def test_experts_are_on_disk_once(streamed: Path, linked: Path) -> None:
    record = manifest_of(linked)["components"]["transformer"]
    assert len(record["shards"]) == 4  # a block's experts each
    ours = {(linked / name).stat().st_ino for name in record["shards"]}
    theirs = {path.stat().st_ino for path in (streamed / "transformer").glob("*.safetensors")}
    assert len(ours) == 4 and ours < theirs
    inside = open_bundle(linked).weights("transformer").tensors
    experts = {name for name in inside if ".experts." in name}
    assert len(experts) == 3 * (2 * 2 + 2)
    own = Checkpoint(linked.parent / "sparse/transformer").names()
    assert {name for name in own if ".experts." in name} == experts


def test_it_is_the_model_of_copies(streamed: Path, linked: Path, tmp_path: Path) -> None:
    """All tensors in one file give the same output to the bit; the experts are the checkpoint's."""
    bundle = open_bundle(linked)
    tensors = bundle.weights("transformer")
    values = {name: torch.from_numpy(tensors.raw(name).copy()) for name in tensors.tensors}
    checkpoint = Checkpoint(streamed / "transformer")
    for name, value in values.items():
        assert ".experts." not in name or torch.equal(value, checkpoint.get(name)), name
    rows = [Placed(n, (n,), False, tuple(v.shape), v.dtype) for n, v in values.items()]
    write(tmp_path / "transformer.safetensors", rows, values.__getitem__)
    program = program_of(linked, "transformer")
    model = compose(program, tmp_path / "transformer.safetensors", 2)
    (tmp_path / "transformer.onnx").write_bytes(model.SerializeToString())
    sizes = {"batch": 1, "image_tokens": 4, "text_tokens": 3, "tokens": 7}
    draw = np.random.default_rng(0)
    feed = {
        name: draw.standard_normal([sizes.get(d, d) for d in row["shape"]], np.float32)
        for name, row in bundle.component("transformer")["inputs"].items()
    }
    paths = (linked / "transformer.onnx", tmp_path / "transformer.onnx")
    first, second = (session(path).run(None, feed)[0] for path in paths)
    assert np.array_equal(first, second) and np.abs(first).max() > 0


def test_the_checkpoint_may_go(streamed: Path, linked: Path, tmp_path: Path) -> None:
    """A hard link is the file itself: without its other name it is as whole."""
    copy = tmp_path / "bundle"
    copy.mkdir()
    for path in linked.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(linked)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy / path.relative_to(linked))
    open_bundle(copy, check="full")


def test_another_storage_links_nothing(streamed: Path, tmp_path: Path) -> None:
    rows = [Placed("a", ("a",), False, (2,), torch.bfloat16)]
    checkpoint = Checkpoint(streamed / "transformer")
    name = next(name for name in checkpoint.names() if name.endswith("experts.w1"))
    shape = checkpoint.shapes()[name]
    other = dataclasses.replace(rows[0], name=name, sources=(name,), shape=shape)
    assert links.whole_shards(checkpoint, [other]) == []


def test_a_refused_link_is_a_copy(
    streamed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(links.errno.EXDEV, "Invalid cross-device link")

    checkpoint = Checkpoint(streamed / "transformer")
    placed = [
        Placed(name, (name,), False, shape, checkpoint.dtype(name))
        for name, shape in checkpoint.shapes().items()
        if ".experts." in name
    ]
    assert len(links.whole_shards(checkpoint, placed)) == 4
    monkeypatch.setattr(links.os, "link", refuse)
    assert links.link_shards(tmp_path, "transformer", checkpoint, placed) == ([], placed)
    assert "cannot be linked (Invalid cross-device link): its tensors are copied" in caplog.text


def test_a_manifest_with_bad_shards(linked: Path, tmp_path: Path) -> None:
    from runtime.bundle.manifest import check

    manifest = json.loads((linked / "manifest.json").read_text())
    for bad in ("x", [1], ["absent.safetensors"]):
        manifest["components"]["transformer"]["shards"] = bad
        with pytest.raises(ValueError, match=r"components\.transformer\.shards in its"):
            check(manifest)
