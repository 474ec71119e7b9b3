"""`d2m export --triton-repo`: the repository's structure, its bytes, and what is left alone."""

import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from d2m.cli import main
from export import triton as nvtriton
from export.triton import write_repository
from runtime.bundle.directory import open_bundle
from tests.stand_ins import pbtxt

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "runtime" / "default"
REPO = ("export", DEFAULT, "--triton-repo")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("triton") / "models"
    write_repository(DEFAULT, path)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_structure_is_that_of_a_python_model(repository: Path) -> None:
    (model,) = repository.iterdir()
    assert sorted(path.name for path in model.iterdir()) == ["1", "config.pbtxt"]
    assert sorted(path.name for path in (model / "1").iterdir()) == ["bundle", "model.py"]
    config = pbtxt.parse((model / "config.pbtxt").read_text())
    pbtxt.check(config, "shapes-s")
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]  # it has no plans
    assert config["max_batch_size"] == 8
    assert config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 64
    compile((model / "1" / "model.py").read_text(), "model.py", "exec")
    assert open_bundle(model / "1" / "bundle", "full").digest == open_bundle(DEFAULT).digest


def test_the_servers_own_protobuf_reads_it(repository: Path) -> None:
    """tritonclient cannot be a requirement: it wants protobuf below 7, onnx brings 7."""
    spec = importlib.util.find_spec("tritonclient")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    text_format = pytest.importorskip("google.protobuf.text_format")
    file = Path(spec.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    found = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    text = (repository / "shapes-s" / "config.pbtxt").read_text()
    parsed, ours = text_format.Parse(text, module.ModelConfig()), pbtxt.parse(text)
    assert parsed.name == ours["name"] and parsed.max_batch_size == ours["max_batch_size"]
    assert [row.name for row in parsed.input] == [row["name"] for row in ours["input"]]
    assert [row.optional for row in parsed.input] == [False] + [True] * 7
    assert {key: row.string_value for key, row in parsed.parameters.items()} == {
        row["key"]: row["value"]["string_value"] for row in ours["parameters"]
    }


def test_the_checker_refuses_what_is_wrong(repository: Path) -> None:
    text = (repository / "shapes-s" / "config.pbtxt").read_text()
    for old, new in (
        ("max_batch_size", "max_batch"),
        ("TYPE_STRING", "TYPE_TEXT"),
        ("KIND_CPU", "KIND_TPU"),
        ("max_batch_size: 8", 'max_batch_size: "8"'),
        ("optional: true", "optional: yes"),
        ("dynamic_batching {", "dynamic_batching"),
    ):
        assert old in text
        with pytest.raises((ValueError, IndexError)):
            pbtxt.parse(text.replace(old, new, 1))


def test_the_bundle_is_linked_and_writing_again_gives_the_same(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(DEFAULT, bundle)
    (bundle / "manifest.sig").write_text("{}")
    told = write_repository(bundle, tmp_path / "a")
    assert told["copied_bytes"] == 0 and told["linked_bytes"] > 10_000_000
    placed = tmp_path / "a" / "shapes-s" / "1" / "bundle"
    for name in ("manifest.json", "manifest.sig", "transformer.safetensors"):
        assert os.path.samefile(placed / name, bundle / name)
    first = tree(tmp_path / "a")
    assert told["files"] == len(first)
    write_repository(bundle, tmp_path / "a")
    write_repository(bundle, tmp_path / "b")
    assert tree(tmp_path / "a") == first == tree(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "bundle"]  # nothing temporary stays


def test_a_file_system_without_links_gets_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with caplog.at_level(logging.WARNING):
        told = write_repository(DEFAULT, tmp_path / "models")
    assert told["linked_bytes"] == 0 and told["copied_bytes"] > 10_000_000
    assert caplog.text.count("cannot be linked") == 1
    open_bundle(tmp_path / "models" / "shapes-s" / "1" / "bundle", "full")


def test_a_bundle_elsewhere_is_only_named(tmp_path: Path) -> None:
    told = write_repository(DEFAULT, tmp_path, instances=2, max_batch=4, at='/mnt/"b"\\x')
    config = pbtxt.parse((tmp_path / told["model"] / "config.pbtxt").read_text())
    assert told["files"] == 2 and not (tmp_path / told["model"] / "1" / "bundle").exists()
    assert config["parameters"][0]["value"] == {"string_value": '/mnt/"b"\\x'}
    assert config["instance_group"][0]["count"] == 2 and config["max_batch_size"] == 4


def test_plans_are_of_gpus_and_bound_the_batch() -> None:
    bundle = open_bundle(DEFAULT, "sizes")
    bundle.manifest["plans"] = {"x": {"profiles": {"batch": [1, 1, 2]}}, "y": {}}
    config = pbtxt.parse(nvtriton.config(bundle, "m", 3, 8, None))
    assert config["instance_group"] == [{"count": 3, "kind": "KIND_GPU"}]
    assert config["max_batch_size"] == 2


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.pbtxt").write_text('name: "other"')
    write_repository(DEFAULT, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["other", "shapes-s"]
    (tmp_path / "shapes-s" / "config.pbtxt").write_text('name: "shapes-s"')
    with pytest.raises(ValueError, match="exists and is no model of d2m"):
        write_repository(DEFAULT, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "x"], "the bundle's directory is not given; add -o BUNDLE"),
        (["export", DEFAULT, "-o", "y"], "is a bundle already"),
        (
            ["export", DEFAULT, "--triton-repo", "r", "--triton-instances", "0"],
            "--triton-instances is 0",
        ),
        (["export", DEFAULT, "--triton-repo", "r", "--triton-batch", "65"], "--triton-batch is 65"),
        (
            ["export", DEFAULT, "--triton-repo", "r", "--triton-bundle", "b"],
            "--triton-bundle is 'b'",
        ),
        (["export", "x", "-o", "y", "--triton-repo", "r", "--triton-batch", "0"], "--triton-batch"),
        (["export", DEFAULT, "--triton-repo", DEFAULT], "lies inside the bundle"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(argument) for argument in arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and not list((DEFAULT.parent).glob(".*.tmp"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = tmp_path / "models"
    assert main(["export", str(DEFAULT), "--triton-repo", str(repository), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "shapes-s" and (repository / "shapes-s" / "config.pbtxt").is_file()
