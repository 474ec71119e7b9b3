"""A bundle is opened only if every file and every field is what it should be."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.bundle import manifest as manifests
from runtime.bundle.directory import open_bundle


@pytest.fixture
def broken(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> dict[str, Any]:
    return json.loads((tiny_bundle / "manifest.json").read_text())


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((path / "manifest.json").read_text())
    change(value)
    (path / "manifest.json").write_text(json.dumps(value))


def sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 600
    return text


def test_opens(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert bundle.manifest["kind"] == "sparse" and len(bundle.digest) == 64
    assert bundle.file("transformer.onnx").is_file()
    assert bundle.weights("transformer") is bundle.weights("transformer")
    with pytest.raises(ValueError, match="lists no file 'other'"):
        bundle.file("other")
    with pytest.raises(ValueError, match="no component 'other', only"):
        bundle.component("other")


def test_opens_the_dense_one(tiny_dense_bundle: Path) -> None:
    assert open_bundle(tiny_dense_bundle).manifest["kind"] == "dense"


def test_a_hash_that_does_not_agree(broken: Path) -> None:
    open_bundle(broken)
    path = broken / "transformer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"transformer\.safetensors has SHA-256 .*expected"):
        open_bundle(broken)
    open_bundle(broken, check="sizes")


@pytest.mark.parametrize(
    ("path", "words"),
    [("nowhere", "is no directory"), (".", "has no manifest.json and no model_index.json")],
)
def test_no_bundle(tmp_path: Path, path: str, words: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{words}, expected a bundle.*d2m export"):
        open_bundle(tmp_path / path)


def test_a_missing_file(broken: Path) -> None:
    (broken / "vae_decoder.onnx").unlink()
    with pytest.raises(ValueError, match=r"file vae_decoder\.onnx is missing"):
        open_bundle(broken)


def test_a_cut_file(broken: Path) -> None:
    os.truncate(broken / "vae_decoder.onnx", 10)
    with pytest.raises(ValueError, match=r"vae_decoder\.onnx has 10 bytes, expected \d+"):
        open_bundle(broken)


def test_a_link_that_leaves_the_directory(broken: Path, tmp_path: Path) -> None:
    path = broken / "vae_decoder.onnx"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"vae_decoder\.onnx is a link that leaves"):
        open_bundle(broken)


def test_a_directory_link_that_leaves(broken: Path, tmp_path: Path) -> None:
    (broken / "tokenizer").rename(tmp_path / "tokenizer")
    (broken / "tokenizer").symlink_to(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="is a link that leaves"):
        open_bundle(broken)


def test_a_link_to_the_bundle_is_fine(broken: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(broken)
    open_bundle(tmp_path / "link")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "a//b",
        "./a",
        "C:/x",
        "a\\b",
        "",
        "a\0b",
        "x" * 600,
        "\n",
    ],
)
def test_a_name_that_leaves_the_directory(broken: Path, name: str) -> None:
    edit(broken, lambda m: m["files"].update({name: {"sha256": "0" * 64, "size": 0}}))
    with pytest.raises(ValueError, match="expected a relative path inside the bundle") as info:
        open_bundle(broken)
    sentence(info.value)


@pytest.mark.parametrize("size", [-1, 1 << 60, 1.0, "1", None, True])
def test_an_absurd_size(broken: Path, size: object) -> None:
    edit(broken, lambda m: m["files"]["transformer.onnx"].update(size=size))
    with pytest.raises(ValueError, match="size in its manifest.json is .*expected a whole number"):
        open_bundle(broken)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 10**30])
def test_an_unknown_format(broken: Path, version: object) -> None:
    edit(broken, lambda m: m.update(format=version))
    with pytest.raises(ValueError, match="its format is .*, expected 1: .*another version of d2m"):
        open_bundle(broken)


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{", "[" * 200_000, '{"format": NaN}', '{"a": 1, "a": 1}', "\ud800", "nul\0"],
)
def test_a_manifest_that_is_no_object(broken: Path, text: str) -> None:
    (broken / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="cannot be used: .*manifest") as info:
        open_bundle(broken)
    sentence(info.value)


def test_a_number_that_would_be_infinity_anywhere_in_a_manifest(broken: Path) -> None:
    path = broken / "manifest.json"
    text = path.read_text()
    for row, name in (("defaults", "guidance"), ("scheduler", "shift")):
        manifest = json.loads(text)
        manifest[row][name] = "HERE"
        path.write_text(json.dumps(manifest).replace('"HERE"', "1e400"))
        with pytest.raises(ValueError, match="cannot be used: .*1e400 is too large a number"):
            open_bundle(broken)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "family": lambda m: m.update(family="unheard of"),
    "kind": lambda m: m.update(kind="other"),
    "compute_dtype": lambda m: m.update(compute_dtype="int8"),
    "components.vae_decoder": lambda m: m["components"].pop("vae_decoder"),
    "components.transformer.onnx": lambda m: m["components"]["transformer"].update(onnx="x"),
    "components.transformer.program": lambda m: m["components"]["transformer"].update(program=[]),
    r"program\[0\].type": lambda m: m["components"]["transformer"]["program"][0].update(type="x"),
    r"program\[0\]": lambda m: m["components"]["transformer"]["program"].pop(0),
    "transformer.outputs": lambda m: m["components"]["transformer"]["program"].pop(),
    "text_encoder.outputs": lambda m: m["components"]["text_encoder"]["outputs"].clear(),
    "double.body": lambda m: m["components"]["transformer"]["types"]["double"].update(body=7),
    "top_k": lambda m: m.update(top_k=3),
    "top_k_choices": lambda m: m.update(top_k_choices=[0, 99]),
    "graphs": lambda m: m.update(top_k_choices=[0, 1, 2, 3, 4]),
    "defaults.steps": lambda m: m["defaults"].update(steps=0),
    "defaults.height": lambda m: m["defaults"].update(height=17),
    "defaults.guidance": lambda m: m["defaults"].update(guidance=1e9),
    "defaults.guidance in its manifest.json is 1": lambda m: m["defaults"].update(guidance=10**400),
    "latents.condition": lambda m: m["latents"].update(condition="x"),
    "hidden_states.shape": lambda m: m["latents"].update(condition="fill"),
    "components.vae_encoder.outputs": lambda m: m["components"]["vae_encoder"]["outputs"].clear(),
    "latents.patch": lambda m: m["latents"].update(patch=4),
    "latents.scaling_factor": lambda m: m["latents"].update(scaling_factor=0),
    "latents.rope_axes": lambda m: m["latents"].update(rope_axes=[4, 6, 7]),
    "tokenizers.tokenizer.max_length": lambda m: m["tokenizers"]["tokenizer"].pop("max_length"),
    "tokenizers.tokenizer_2.file": lambda m: m["tokenizers"]["tokenizer_2"].update(file="x"),
    "scheduler": lambda m: m.pop("scheduler"),
    "sha256": lambda m: m["files"]["transformer.onnx"].update(sha256="ABC"),
    "plans.x.files": lambda m: m.update(
        plans={
            "x": {"api": "a", "version": "1", "compute_capabilities": [], "files": {"b": "../b"}}
        }
    ),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_wrong_field_is_named(broken: Path, field: str) -> None:
    edit(broken, CHANGES[field])
    with pytest.raises(ValueError, match=f"cannot be used: .*{field}.*; fetch it or") as info:
        open_bundle(broken)
    assert "expected" in sentence(info.value)


@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, -4], "1,1,4", [1, 1, 4.0]])
def test_a_wrong_profile(broken: Path, sizes: object) -> None:
    row = {"api": "a", "version": "1", "compute_capabilities": [], "files": {}}
    edit(broken, lambda m: m.update(plans={"x": {**row, "profiles": {"batch": sizes}}}))
    with pytest.raises(ValueError, match=r"plans\.x\.profiles\.batch .* three sizes"):
        open_bundle(broken)


def test_weights_that_do_not_fit_the_program(broken: Path) -> None:
    def rename(m: dict[str, Any]) -> None:
        m["components"]["transformer"]["program"][1]["prefix"] = "other."

    edit(broken, rename)
    with pytest.raises(ValueError, match=r"transformer\.safetensors has no tensor other\."):
        open_bundle(broken)


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.just(["x"] * 9),
    st.just({"": None}),
    st.sampled_from(["../x", "/x", "", "9" * 5000]),
).map(copy.deepcopy)  # lists and dicts are changed further


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_change_is_accepted_or_refused_in_a_sentence(
    manifest: dict[str, Any], data: st.DataObject
) -> None:
    changed = copy.deepcopy(manifest)
    for _ in range(data.draw(st.integers(1, 3))):
        target: Any = changed
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(target[key], dict | list) and data.draw(st.integers(0, 4)):
                target = target[key]  # most of the time deeper
                continue
            if isinstance(target, dict) and data.draw(st.booleans()):
                del target[key]
            else:
                target[key] = data.draw(junk)
            break
    try:
        manifests.check(changed)
    except ValueError as error:
        sentence(error)
