"""A VAE encoder added to a bundle that has none is the one that export writes."""

import json
import shutil
from pathlib import Path

import pytest

from export.add_encoder import add_vae_encoder
from runtime.bundle.directory import open_bundle
from runtime.sampling import encode_image


@pytest.fixture
def old(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle as it was exported before there were encoders."""
    path = tmp_path / tiny_bundle.name
    shutil.copytree(tiny_bundle, path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["components"]["vae_encoder"]
    for name in [name for name in manifest["files"] if "vae_encoder" in name]:
        (path / name).unlink()
        del manifest["files"][name]
    (path / "blocks/vae_encoder").rmdir()
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_added_is_what_is_exported(
    old: Path, tiny_bundle: Path, tiny_sparse_dir: Path
) -> None:
    add_vae_encoder(tiny_sparse_dir, old)
    assert contents(old) == contents(tiny_bundle)
    with pytest.raises(ValueError, match="has a vae_encoder already"):
        add_vae_encoder(tiny_sparse_dir, old)


def test_an_old_bundle_opens_and_says_what_it_lacks(old: Path) -> None:
    import numpy as np

    from runtime.pipeline import Pipeline

    pipeline = Pipeline(open_bundle(old), "ort", threads=1)
    assert pipeline("a red circle", steps=1, output_type="np").shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match="no vae_encoder.*d2m export PIPELINE --add-vae-encoder"):
        encode_image(pipeline, np.zeros((1, 3, 16, 16), np.float32))


def test_another_models_vae_is_refused(old: Path, tiny_sparse_dir: Path, tmp_path: Path) -> None:
    from tests.tiny.pipeline import build_pipeline

    other = tmp_path / "other"
    shutil.copytree(tiny_sparse_dir, other)
    build_pipeline(seed=7).vae.save_pretrained(other / "vae")
    before = contents(old)
    with pytest.raises(ValueError, match="has another VAE than the pipeline"):
        add_vae_encoder(other, old)
    assert contents(old) == before
