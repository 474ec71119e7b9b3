"""Finding and recognising the dense pipeline."""

import dataclasses
import json

import pytest

from d2m.convert.dense import dense_family, fingerprint, licence_of
from d2m.families import FLUX
from d2m.plan.hub import locate
from d2m.recipe.recipe import preset
from tests.tiny.pipeline import tiny_pipeline

RECIPE = preset("L")


@pytest.fixture
def dense(tmp_path):
    """The files that are looked at, without the weights' classes being loaded."""
    path = tmp_path / "pipe"
    (path / "transformer").mkdir(parents=True)
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (path / "model_index.json").write_text(json.dumps(index))
    config = {"num_attention_heads": 2, "attention_head_dim": 16}
    (path / "transformer" / "config.json").write_text(json.dumps(config))
    (path / "transformer" / "model.safetensors").write_bytes(b"\1" * (3 << 20))
    return path


def test_mistyped_paths_are_not_sent_to_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("models/shapes-dens", "./pipe", "../pipe", "/a/b", "a/b/c", "pipe", "~/pipe"):
        with pytest.raises(FileNotFoundError, match="is no directory; expected"):
            locate(name)
    assert locate("models").name == "models"


def test_hub_failures_are_one_sentence(monkeypatch, tmp_path):
    from diffusers import DiffusionPipeline

    def fail(name):
        raise OSError("offline\nwith details")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "download", fail)
    with pytest.raises(FileNotFoundError, match=r"the hub \(offline\); check the path"):
        locate("owner/name")

    def wrapped(name):
        try:
            raise ConnectionError("[Errno 111] Connection refused")
        except ConnectionError as error:
            raise OSError("not cached. Look for the root cause in the stacktrace above.") from error

    monkeypatch.setattr(DiffusionPipeline, "download", wrapped)
    with pytest.raises(FileNotFoundError, match=r"hub \(\[Errno 111\] Connection refused\); check"):
        locate("owner/name")
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name: str(tmp_path))
    assert locate("owner/name") == tmp_path


def test_family_of_a_real_pipeline(tmp_path):
    assert dense_family(tiny_pipeline(tmp_path), RECIPE) is FLUX


def test_pipelines_that_cannot_be_converted(dense):
    assert dense_family(dense, RECIPE) is FLUX
    with pytest.raises(ValueError, match="do not make up the FFN's 128 neurons"):
        dense_family(dense, dataclasses.replace(RECIPE, num_experts=11))
    config = dense / "transformer" / "config.json"
    config.write_text("{}")
    with pytest.raises(ValueError, match="is not a FluxTransformer2DModel's config"):
        dense_family(dense, RECIPE)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        dense_family(dense, RECIPE)
    index = {"_class_name": "FluxPipeline", "transformer": ["d2m", "SparseFluxTransformer2DModel"]}
    (dense / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is a SparseFluxTransformer2DModel; expected a dense"):
        dense_family(dense, RECIPE)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_fingerprint_sees_weights_and_config(dense, name):
    before = fingerprint(dense)
    assert fingerprint(dense) == before
    path = dense / "transformer" / name
    data = path.read_bytes()
    path.write_bytes(data + b" ")
    assert fingerprint(dense) != before
    path.write_bytes(b" " + data[1:])
    assert fingerprint(dense) != before
    path.write_bytes(data)
    assert fingerprint(dense) == before


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", "apache-2.0"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("# Model\nlicense: mit\n", None),
        (None, None),
    ],
)
def test_licence(tmp_path, text, licence):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == licence
