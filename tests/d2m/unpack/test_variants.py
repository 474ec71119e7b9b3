"""Pipelines stored as a variant are read by their plain names, without a copy."""

import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from d2m.unpack.variants import choose, plain_pipeline, variants_of
from runtime.files.checked_json import read_json


@pytest.fixture(scope="module")
def stored(tiny_dense_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as diffusers stores a variant, the transformer in shards."""
    path = tmp_path_factory.mktemp("variant") / "fp16"
    pipe = DiffusionPipeline.from_pretrained(tiny_dense_dir, local_files_only=True)
    pipe.save_pretrained(path, variant="fp16", max_shard_size="100KB")
    return path


def test_links_by_plain_names(stored: Path, tiny_dense_dir: Path, tmp_path: Path) -> None:
    assert set(map(frozenset, variants_of(stored).values())) == {frozenset({"fp16"})}
    out = plain_pipeline(stored, None, tmp_path / "plain")
    found = read_json(out / "transformer" / "diffusion_pytorch_model.safetensors.index.json")
    for file in set(found["weight_map"].values()):
        assert "fp16" not in file and (out / "transformer" / file).is_symlink()
    assert len(set(found["weight_map"].values())) > 1
    first = DiffusionPipeline.from_pretrained(out, local_files_only=True)
    second = DiffusionPipeline.from_pretrained(tiny_dense_dir, local_files_only=True)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for one, two in zip(
            getattr(first, name).parameters(), getattr(second, name).parameters(), strict=True
        ):
            assert (one == two).all()


def test_which_one_is_taken(stored: Path, tiny_dense_dir: Path, tmp_path: Path) -> None:
    assert choose(tiny_dense_dir, None) == ""
    with pytest.raises(ValueError, match="no files of the variant 'fp16': its files are of no var"):
        choose(tiny_dense_dir, "fp16")
    both = shutil.copytree(tiny_dense_dir, tmp_path / "both")
    shutil.copytree(stored, both, dirs_exist_ok=True)
    assert choose(both, None) == "" and choose(both, "fp16") == "fp16"
    assert plain_pipeline(both, None, tmp_path / "x") == both
    taken = plain_pipeline(both, "fp16", tmp_path / "x")
    files = list((taken / "vae").glob("*.safetensors"))
    assert files and all(".fp16" in file.resolve().name for file in files)
    (both / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (both / "text_encoder" / "model.bf16.safetensors").touch()
    with pytest.raises(ValueError, match="is stored as bf16, fp16; say which with --variant"):
        choose(both, None)
