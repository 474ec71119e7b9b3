"""Whole files and directories or none; a dead maker's leftovers are swept, a living one's not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.files import atomic as files
from runtime.files.atomic import ASIDE, sweep, temporary_dir, temporary_file, temporary_sibling

ROOT = Path(__file__).resolve().parents[3]
pytest.importorskip("fcntl")

DIES = """
import os, signal, sys
from pathlib import Path
from runtime.files.atomic import temporary_dir, temporary_file
path = Path(sys.argv[1])
with temporary_dir(path / "a") as folder, temporary_file(path / "b") as (file, _):
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A directory with what a killed process leaves."""
    command = [sys.executable, "-c", DIES, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT).returncode == -9
    assert len(names(tmp_path)) == 2
    return tmp_path


def test_the_next_one_of_that_name_sweeps(left: Path) -> None:
    for path in left.iterdir():
        os.utime(path, (4e9, 4e9))  # whatever clocks say
    sweep(left / "c")
    assert len(names(left)) == 2
    files.write_text(left / "b", "whole")
    assert [name for name in names(left) if not name.startswith(".a.")] == ["b"]
    with temporary_dir(left / "a") as folder:
        assert names(left) == [folder.name, "b"]
    assert names(left) == ["b"]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with temporary_file(path) as (file, temporary):
        os.utime(temporary, (0, 0))
        sweep(path)
        file.write(b"mine")
        file.flush()
        os.replace(temporary, path)
    assert path.read_bytes() == b"mine" and names(tmp_path) == ["x"]
    with temporary_dir(path) as folder:
        sweep(path)
        assert folder.is_dir()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    for maker in (temporary_dir, temporary_file):
        with pytest.raises(RuntimeError), maker(tmp_path / "x"):
            raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.parametrize("maker", [temporary_file, temporary_dir])
def test_a_sibling_swept_before_its_lock_is_made_again(
    maker: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between a name's creation and its lock, in which another process may sweep."""
    real, gone = files._lock, []

    def lock(descriptor: int) -> bool | None:
        if not gone:
            gone.extend(tmp_path.iterdir())
            for each in gone:
                each.rmdir() if each.is_dir() else each.unlink()
        return real(descriptor)

    monkeypatch.setattr(files, "_lock", lock)
    with maker(tmp_path / "x"):
        assert len(gone) == 1 and len(names(tmp_path)) == 1
        assert names(tmp_path) != [gone[0].name]
    assert names(tmp_path) == []


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    temporary_sibling(tmp_path / "x").symlink_to(tmp_path / "kept")
    sweep(tmp_path / "x")
    assert names(tmp_path) == ["kept"] and names(tmp_path / "kept") == ["file"]


# ---------------------------------------------------------------- replacing a directory


def folder_of(path: Path, text: str) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "file").write_text(text)
    return path


@pytest.mark.parametrize("can", [True, False], ids=["exchange", "two renames"])
def test_replace(can: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    elif sys.platform == "linux":
        one, other = folder_of(tmp_path / "one", "1"), folder_of(tmp_path / "other", "2")
        if not files.exchange(one, other):
            pytest.skip("this file system exchanges no names")
        assert (one / "sub" / "file").read_text() == "2"
        files.exchange(one, other)
    else:
        pytest.skip("names are exchanged on Linux alone")
    final = tmp_path / "final"
    for text in ("first", "second"):
        files.replace_dir(folder_of(temporary_sibling(final), text), final)
        assert (final / "sub" / "file").read_text() == text
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def test_what_a_killed_one_moved_aside_comes_back(tmp_path: Path) -> None:
    final = tmp_path / "final"
    folder_of(temporary_sibling(final, ASIDE), "old")
    sweep(final)
    assert (final / "sub" / "file").read_text() == "old"
    folder_of(temporary_sibling(final, ASIDE), "older")
    sweep(final)
    assert names(tmp_path) == ["final"] and (final / "sub" / "file").read_text() == "old"


def test_a_rival_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an exchange another process may take the name that was just freed: later wins."""
    final = folder_of(tmp_path / "final", "old")
    rename = os.rename
    came: list[str] = []

    def meanwhile(one: object, other: object) -> None:
        rename(one, other)  # type: ignore[arg-type]
        if str(other).endswith(ASIDE) and not came:
            came.append("rival")
            folder_of(final, "rival")

    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    monkeypatch.setattr(files.os, "rename", meanwhile)
    files.replace_dir(folder_of(temporary_sibling(final), "new"), final)
    assert came and (final / "sub" / "file").read_text() == "new"
    assert names(tmp_path) == ["final"]


# ---------------------------------------------------------------- files


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


def test_temporary_siblings_are_fresh_hidden_neighbours(tmp_path):
    names = {temporary_sibling(tmp_path / "out") for _ in range(10)}
    assert len(names) == 10
    assert all(n.parent == tmp_path and n.name.startswith(".out.") for n in names)


def test_rights_hold_from_the_beginning(tmp_path: Path) -> None:
    with temporary_file(tmp_path / "secret", 0o600) as (_, temporary):
        assert temporary.stat().st_mode & 0o777 == 0o600
    assert files.write_bytes(tmp_path / "secret", b"x", 0o600).stat().st_mode & 0o777 == 0o600
