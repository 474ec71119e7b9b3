"""A hash is computed once for as long as a file stays, and never taken for another file's."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.files import hashes

OLD = 2.5  # seconds after which a change counts as settled, with some to spare


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read through, in order."""
    found: list[str] = []
    digest = hashes.hashlib.file_digest

    def noted(file, kind):
        found.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(hashes.hashlib, "file_digest", noted)
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2M_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settled(path: Path, data: bytes) -> Path:
    """A file whose last change is some seconds ago (a change time cannot be set, only waited)."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Move the process's clock."""
    real, moved = time.time, [0.0]
    monkeypatch.setattr(hashes.time, "time", lambda: real() + moved[0])
    return lambda seconds: moved.__setitem__(0, seconds)


def again(root: Path, path: Path, anew: bool = False) -> str:
    """The hash of a file in `root`, which is not the one wanted."""
    wrong = hashes.first_mismatch(root, {path.name: ""}, anew=anew)
    assert wrong is not None and wrong[0] == path.name
    return wrong[1]


def test_another_process_reads_it_no_more(tmp_path: Path, cache: Path, read, later) -> None:
    path = settled(tmp_path / "bundle/a", b"x")
    later(OLD)
    first = again(path.parent, path)
    assert again(path.parent, path) == first and read == ["a"]
    assert again(path.parent, path, anew=True) == first
    assert read == ["a", "a"]  # --verify full
    assert [p.parent for p in cache.rglob("*.json")] == [cache / "hashes"]
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.parametrize("change", ["same size and time", "other size", "replaced", "recent"])
def test_a_changed_file_is_read_again(
    tmp_path: Path, cache: Path, read, later, change: str
) -> None:
    path = settled(tmp_path / "bundle/a", b"one")
    before = path.stat()
    later(OLD if change != "recent" else 0)
    first = again(path.parent, path)
    if change == "replaced":
        other = settled(tmp_path / "bundle/b", b"two")
        os.replace(other, path)
    elif change == "other size":
        path.write_bytes(b"four")
    else:
        path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert again(path.parent, path) != first
    assert read == ["a", "a"]


def test_only_what_changed_is_read_again(tmp_path: Path, cache: Path, read, later) -> None:
    root = tmp_path / "bundle"
    wanted = {name: hashes.sha256(settled(root / name, name.encode())) for name in "abc"}
    read.clear()
    later(OLD)
    assert hashes.first_mismatch(root, wanted | {"b": "0"}) == ("b", wanted["b"])
    assert read == ["a", "b"]  # and both are remembered though one was wrong
    assert hashes.first_mismatch(root, wanted) is None and read == ["a", "b", "c"]
    (root / "b").write_bytes(b"other")
    assert hashes.first_mismatch(root, wanted) is not None and read == ["a", "b", "c", "b"]


def test_times_in_the_future_are_not_believed(tmp_path: Path, cache: Path, read) -> None:
    path = settled(tmp_path / "bundle/a", b"x")
    os.utime(path, (4e9, 4e9))
    again(path.parent, path)
    again(path.parent, path)
    assert read == ["a", "a"]


@pytest.mark.parametrize("junk", [b"", b"[]", b"{", b'{"a": 1}', b"\xff", b"[" * 100_000])
def test_a_broken_cache_is_no_obstacle(tmp_path: Path, cache: Path, read, later, junk) -> None:
    path = settled(tmp_path / "bundle/a", b"x")
    later(OLD)
    first = again(path.parent, path)
    (place,) = cache.rglob("*.json")
    place.write_bytes(junk)
    assert again(path.parent, path) == first and read == ["a", "a"]
    place.write_text(json.dumps({"a": [None]}))
    assert again(path.parent, path) == first and read == ["a", "a", "a"]


def test_no_cache_is_no_obstacle(tmp_path: Path, monkeypatch, read, later, caplog) -> None:
    path = settled(tmp_path / "bundle/a", b"x")
    later(OLD)
    (tmp_path / "file").write_text("")
    for place in ("", str(tmp_path / "file")):
        monkeypatch.setenv("D2M_CACHE", place)
        with caplog.at_level("INFO", "runtime"):
            again(path.parent, path)
    assert read == ["a", "a"] and "are not remembered" in caplog.text


def test_never_inside_the_bundle(tmp_path: Path, monkeypatch, later) -> None:
    path = settled(tmp_path / "bundle/a", b"x")
    monkeypatch.setenv("D2M_CACHE", str(path.parent / "cache"))
    later(OLD)
    again(path.parent, path)
    assert os.listdir(path.parent) == ["a"]


def test_what_was_killed_and_what_is_old_goes(tmp_path: Path, cache: Path, later) -> None:
    folder = cache / "hashes"
    folder.mkdir(parents=True)
    for index in range(hashes.MAX_BUNDLES + 9):
        (folder / f"{index}.json").write_text("{}")
        os.utime(folder / f"{index}.json", (index, index))
    (folder / ".x.json.0.tmp").write_text("{}")
    later(7200)
    hashes.remember(tmp_path / "bundle", {})
    names = {path.name for path in folder.iterdir()}
    assert (
        len(names) == hashes.MAX_BUNDLES and "0.json" not in names and ".x.json.0.tmp" not in names
    )


def test_sha256(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    assert hashes.sha256(settled(tmp_path / "x", data)) == hashlib.sha256(data).hexdigest()


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch) -> None:
    path = settled(tmp_path / "a", b"x")
    digest = hashes.hashlib.file_digest

    def changed(file, kind):
        path.write_bytes(b"longer")
        return digest(file, kind)

    monkeypatch.setattr(hashes.hashlib, "file_digest", changed)
    with pytest.raises(ValueError, match="changed while it was read"):
        hashes.sha256(path)
