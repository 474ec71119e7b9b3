"""Bundles made to harm: each attack ends in one sentence, within bounds of time and memory."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.bundle import tokenizer_file as vocabulary
from runtime.bundle.directory import open_bundle
from runtime.inspect.directory import inspect, summary_lines
from runtime.opened import default_bundle
from runtime.pipeline import Pipeline
from runtime.tokenizer import TextTokenizer

SECONDS = 3.0  # of this process's own time, to open or refuse anything here
Json = dict[str, Any]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The bundle that ships, to break; files are links as long as nobody writes to them."""
    source, target = default_bundle(), tmp_path / "bundle"
    shutil.copytree(source, target, copy_function=os.link)
    text = (target / "manifest.json").read_text()
    (target / "manifest.json").unlink()
    (target / "manifest.json").write_text(text)
    return target


def edit(bundle: Path, change: Callable[[Json], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def refused(bundle: Path) -> str:
    began = time.process_time()
    with pytest.raises((ValueError, FileNotFoundError)) as info:
        open_bundle(bundle)
    assert time.process_time() - began < SECONDS
    text = str(info.value)
    assert text.isprintable() and len(text) < 600
    return text


# ---------------------------------------------------------------- files


def test_a_manifest_that_is_a_link_to_another_file(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"format": "secret"}')
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").symlink_to(tmp_path / "secret")
    assert "secret" not in refused(bundle).replace(str(tmp_path), "")


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="no /proc")
@pytest.mark.parametrize("target", ["/proc/self/pagemap", "/dev/zero", "/dev/stdin"])
def test_a_manifest_without_an_end(bundle: Path, target: str) -> None:
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").symlink_to(target)
    refused(bundle)


def test_a_pipe_in_place_of_a_file(bundle: Path) -> None:
    for name in ("transformer.onnx", "manifest.json"):
        (bundle / name).unlink()
        os.mkfifo(bundle / name)
        refused(bundle)


def test_a_directory_in_place_of_a_file(bundle: Path) -> None:
    (bundle / "transformer.onnx").unlink()
    (bundle / "transformer.onnx").mkdir()
    assert "transformer.onnx is missing" in refused(bundle)


def test_a_link_in_a_circle(bundle: Path) -> None:
    (bundle / "transformer.onnx").unlink()
    (bundle / "transformer.onnx").symlink_to("transformer.onnx")
    refused(bundle)


def test_a_zip_is_no_bundle(bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as file:
        file.writestr("../../out", "x")
        file.write(bundle / "manifest.json", "manifest.json")
    assert "is a file, expected a bundle" in refused(tmp_path / "bundle.zip")
    assert not (tmp_path.parent.parent / "out").exists()


def test_a_zip_in_place_of_weights(bundle: Path) -> None:
    path = bundle / "vae_decoder.safetensors"
    path.unlink()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    edit(bundle, lambda m: m["files"]["vae_decoder.safetensors"].update(facts(path)))
    assert "is not valid safetensors" in refused(bundle)


def facts(path: Path) -> Json:
    import hashlib

    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def test_nothing_is_written_into_a_bundle(bundle: Path) -> None:
    before = sorted(bundle.rglob("*"))
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    Pipeline(bundle, "ort", threads=1)("a photo of a red circle", steps=1)
    assert sorted(bundle.rglob("*")) == before
    for path in (bundle, *before):
        if path.is_dir():
            path.chmod(0o755)


# ---------------------------------------------------------------- the manifest


def many_values(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("[" + "[]," * 2_700_000 + "[]]")


def many_calls(m: Json) -> None:
    """4096 calls of a type with a great many inputs."""
    row = m["components"]["transformer"]
    kind = row["types"]["double"]
    kind["inputs"] = ["hidden_states"] * 50_000
    row["program"] = [{"type": "double", "prefix": ""}] * 4096


def many_weights(m: Json) -> None:
    """Thousands of calls that name the same tensors, all of which exist."""
    row = m["components"]["transformer"]
    call = next(call for call in row["program"] if call["type"] == "double")
    row["program"][1:1] = [call] * 4000


def many_choices(m: Json) -> None:
    m["top_k_choices"] = [2] * 500_000


def many_types(m: Json) -> None:
    row = m["components"]["transformer"]
    row["types"] |= {f"t{i}": row["types"]["final"] for i in range(5000)}


MANIFESTS: dict[str, tuple[Callable[[Json], object], str]] = {
    "many inputs": (many_calls, "a list of at most 256 tensor names"),
    "many choices": (many_choices, "a list of 1 to 13 numbers of experts"),
    "many types": (many_types, "5000 entries|5[0-9]{3} entries"),
    "many files": (
        lambda m: m["files"].update({f"f{i}": m["files"]["vae_decoder.onnx"] for i in range(9999)}),
        "at most 10000",
    ),
    "terminal": (lambda m: m.update(name="\x1b[2J"), "name in its manifest.json is '.x1b"),
    "lines": (lambda m: m.update(name="a\nb"), "printable characters"),
    "surrogate": (lambda m: m.update(name="\ud800"), "printable characters"),
    "terminal in a key": (
        lambda m: m["components"]["transformer"]["inputs"].update({"\x1b[2J": 1}),
        r"\\x1b",
    ),
    "prompt": (
        lambda m: m["tokenizers"]["tokenizer"].update(max_length=1 << 16),
        "a whole number from 1 to 4096",
    ),
    "capabilities": (
        lambda m: m.update(
            plans={"x": {"api": "a", "version": "1", "compute_capabilities": ["x"], "files": {}}}
        ),
        "a list of numbers such as 89",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest(bundle: Path, name: str) -> None:
    change, words = MANIFESTS[name]
    edit(bundle, change)
    assert re.search(words, refused(bundle))


def test_many_weights_are_counted_before_they_are_looked_up(bundle: Path) -> None:
    from runtime.bundle import directory as bundles

    edit(bundle, many_weights)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(bundles, "MAX_TENSORS", 10_000)
        assert "names over 10000 tensors" in refused(bundle)


def test_a_manifest_of_empty_lists_takes_no_memory(bundle: Path) -> None:
    many_values(bundle)
    code = (
        "import resource, sys; from runtime.bundle.directory import open_bundle\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: open_bundle(sys.argv[1])\n"
        "except ValueError as error: assert 'values' in str(error), error\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    command = [sys.executable, "-c", code, str(bundle)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 60  # the text has 8; parsed it would be 200


def test_inspect_prints_nothing_that_a_terminal_obeys(bundle: Path) -> None:
    edit(bundle, lambda m: m["defaults"].update({"\x1b[2J": "\x1b]0;x\x07"}))
    assert all(line.isprintable() for line in summary_lines(inspect(bundle)))


def test_inspect_of_a_pipeline_stays_inside(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    shutil.copy(default_bundle() / "vae_decoder.safetensors", tmp_path / "outside")
    (folder / "model_index.json").write_text(json.dumps({"../outside": ["a", "b"]}))
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="expected the transformer's weights"):
        inspect(folder)


# ---------------------------------------------------------------- tokenizers


def tokenizer() -> Json:
    return json.loads((default_bundle() / "tokenizer/tokenizer.json").read_text())


def bomb() -> Json:
    """Sixty replacements that double what they find."""
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"normalizer": {"type": "Sequence", "normalizers": [step] * 15}}


TOKENIZERS: dict[str, tuple[Json, str]] = {
    "replacements": (bomb(), "make a text 32768 times as long"),
    "steps": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 99}},
        "at most 16",
    ),
    "expression": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}},
        "pattern .*a\\+.* which FLUX",
    ),
    "empty pattern": (
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
        "has the pattern",
    ),
    "long content": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 9999}},
        "expected a short text",
    ),
    "sequences": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence"}]}},
        "a normalizer of type 'Sequence'",
    ),
    "model": ({"model": {"type": "Else"}}, "a model of type 'Else'"),
    "no model": ({"model": 7}, "no object with a model"),
    "piece": (
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["u", 0.0], ["a" * 300_000, -1.0]]}},
        "a token of 300000 characters",
    ),
    "no vocab": ({"model": {"type": "Unigram", "unk_id": 0, "vocab": 7}}, ""),
    "word": ({"model": {**tokenizer()["model"], "vocab": {"a" * 1001: 0}}}, "1001 characters"),
    "added": ({"added_tokens": [{"id": 0, "content": "a" * 2000}]}, "content of a token"),
    "dropout": ({"model": {**tokenizer()["model"], "dropout": 0.5}}, "at random"),
    "added tokens": ({"added_tokens": 7}, "no list of tokens"),
    "charsmap": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, ""),
    "unigram": ({"model": {"type": "Unigram", "unk_id": 7, "vocab": []}}, ""),
}  # fmt: skip


def opened(path: Path, value: object) -> list[int]:
    path.write_text(json.dumps(value))
    spec = {"max_length": 16, "pad_id": 1}
    return TextTokenizer("tokenizer", path, spec)(["aaaaaaaa red\0 circle \U0001f600"])[0].tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer(tmp_path: Path, name: str) -> None:
    change, words = TOKENIZERS[name]
    began = time.process_time()
    with pytest.raises(ValueError, match=f"(?s){words}") as info:
        opened(tmp_path / "tokenizer.json", tokenizer() | change)
    assert time.process_time() - began < SECONDS
    assert str(info.value).isprintable() and len(str(info.value)) < 600


def test_the_real_ones_pass(tmp_path: Path) -> None:
    assert len(opened(tmp_path / "a.json", tokenizer())) == 16
    t5 = {"type": "Sequence", "normalizers": [
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
    ]}  # fmt: skip
    opened(tmp_path / "b.json", tokenizer() | {"normalizer": t5})


junk = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=6), st.just([]), st.just({}), st.just([["a", 0.5]]),
    st.sampled_from(["Replace", "Sequence", "Split", "Precompiled", "Unigram", "WordLevel"]),
).map(copy.deepcopy)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_a_tokenizer(data: st.DataObject, tmp_path_factory) -> None:
    changed = tokenizer()
    for _ in range(data.draw(st.integers(1, 3))):
        target: Any = changed
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(target[key], dict | list) and data.draw(st.integers(0, 4)):
                target = target[key]
                continue
            target[key] = data.draw(junk)
            break
    try:
        opened(tmp_path_factory.mktemp("t") / "tokenizer.json", changed)
    except ValueError as error:
        assert str(error).isprintable()


def test_growth_has_a_bound() -> None:
    assert vocabulary.GROWTH <= 64 and vocabulary.MAX_STEPS <= 16
