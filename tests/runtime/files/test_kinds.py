"""A path that is not what was expected is named, with the command that takes it."""

import json
import struct
from pathlib import Path

import pytest

from d2m.families import family_of
from d2m.plan.hub import locate
from d2m.plan.model_config import subject_of
from runtime.bundle.directory import open_bundle
from runtime.files.kinds import kind, not_a


def safetensors(path: Path, *names: str) -> Path:
    header = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    data = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    return path


def pipeline(path: Path, transformer: str) -> Path:
    (path / "transformer").mkdir(parents=True)
    index = {"_class_name": "FluxPipeline", "transformer": ["d2m", transformer]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def test_each_kind(tmp_path: Path) -> None:
    lora = safetensors(tmp_path / "my lora.safetensors", "transformer.x.lora_A.weight")
    assert kind(lora) == ("is a LoRA", f"fuse it with: d2m lora '{lora}' --onto PIPELINE -o NEW")
    kohya = safetensors(tmp_path / "k.safetensors", "lora_unet_x.lora_down.weight")
    assert kind(kohya)[0] == "is a LoRA"
    single = safetensors(tmp_path / "flux1.safetensors", "double_blocks.0.img_attn.qkv.weight")
    assert kind(single)[0] == "is a single-file checkpoint" and "--base PIPELINE" in kind(single)[1]
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02")
    assert kind(tmp_path / "old.ckpt")[0] == "is a pickled checkpoint"
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert kind(tmp_path / "m.gguf")[0] == "is a GGUF file (quantized weights)"
    (tmp_path / "out.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    assert "d2m run --regenerate" in kind(tmp_path / "out.png")[1]
    sparse = pipeline(tmp_path / "sparse", "SparseFluxTransformer2DModel")
    assert kind(sparse) == ("is a sparse pipeline", f"compile it with: d2m export {sparse} -o NEW")
    dense = pipeline(tmp_path / "dense", "FluxTransformer2DModel")
    assert kind(dense) == ("is a dense pipeline", f"convert it with: d2m convert {dense} -o NEW")
    assert kind(dense / "transformer") == (
        "is a part of a pipeline",
        f"give the whole one: {dense}",
    )
    (tmp_path / "notes.txt").write_text("")
    assert kind(tmp_path / "notes.txt") == ("is a file", "")
    assert kind(tmp_path / "none") == ("is no directory", "")


def test_who_expects_something_else_says_so(tmp_path: Path) -> None:
    """No cure names the path that was given as the one to write."""
    sparse = pipeline(tmp_path / "sparse", "SparseFluxTransformer2DModel")
    with pytest.raises(FileNotFoundError) as caught:
        open_bundle(sparse)
    compile_it = f"compile it with: d2m export {sparse} -o NEW"
    assert str(caught.value) == f"{sparse} is a sparse pipeline, expected a bundle; {compile_it}"
    lora = safetensors(tmp_path / "l.safetensors", "x.lora_A.weight")
    for function in (family_of, subject_of, open_bundle):
        with pytest.raises(FileNotFoundError, match="is a LoRA, expected a .*d2m lora "):
            function(lora)
    nothing = not_a("a bundle", "a red circle", "make one")
    assert nothing == "a red circle is no directory, expected a bundle; make one"


def test_a_shipped_config_has_no_weights() -> None:
    with pytest.raises(
        FileNotFoundError, match="flux-dev is a config .* give a pipeline directory"
    ):
        locate("flux-dev")
