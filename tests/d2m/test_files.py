"""Atomic writes: whole or not at all."""

import hashlib
import json
import os

import pytest

from d2m import files
from d2m.siblings import temporary_sibling


def test_write_and_replace(tmp_path):
    path = tmp_path / "deep" / "a.bin"
    assert files.write_bytes(path, b"one") == path
    files.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["a.bin"]


def test_json_is_stable(tmp_path):
    path = files.write_json(tmp_path / "x.json", {"b": 1, "a": "\u00e9"})
    assert path.read_text("utf-8") == '{\n  "a": "\u00e9",\n  "b": 1\n}\n'
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text("utf-8"))["b"] == 1
    assert os.listdir(tmp_path) == ["x.json"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = files.write_text(tmp_path / "x.txt", "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_replace_dir(tmp_path):
    final = tmp_path / "out"
    for text in ("first", "second"):
        temporary = temporary_sibling(final)
        (temporary / "sub").mkdir(parents=True)
        (temporary / "sub" / "file").write_text(text)
        files.replace_dir(temporary, final)
        assert (final / "sub" / "file").read_text() == text
        assert os.listdir(tmp_path) == ["out"]


def test_temporary_siblings_are_fresh_hidden_neighbours(tmp_path):
    names = {temporary_sibling(tmp_path / "out") for _ in range(10)}
    assert len(names) == 10
    assert all(n.parent == tmp_path and n.name.startswith(".out.") for n in names)


def test_sha256(tmp_path):
    data = os.urandom((1 << 20) + 17)
    path = files.write_bytes(tmp_path / "x", data)
    assert files.sha256(path) == hashlib.sha256(data).hexdigest()
