"""Temporary siblings: a dead maker's are swept, a living one's are left alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import d2m.siblings
import runtime.siblings
from d2m import files
from d2m.siblings import ASIDE, sweep, temporary_dir, temporary_file, temporary_sibling

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("fcntl")

DIES = """
import os, signal, sys
from pathlib import Path
from d2m.siblings import temporary_dir, temporary_file
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


def test_the_runtime_sweeps_files(left: Path) -> None:
    runtime.siblings.write_bytes(left / "b", b"whole")
    assert (left / "b").read_bytes() == b"whole"
    assert [name for name in names(left) if not name.startswith(".a.")] == ["b"]


@pytest.mark.parametrize("module", [d2m.siblings, runtime.siblings])
def test_what_a_living_process_writes_stays(module: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with module.temporary_file(path) as (file, temporary):
        os.utime(temporary, (0, 0))
        d2m.siblings.sweep(path)
        runtime.siblings.sweep(path)
        file.write(b"mine")
        file.flush()
        os.replace(temporary, path)
    assert path.read_bytes() == b"mine" and names(tmp_path) == ["x"]
    with temporary_dir(path) as folder:
        sweep(path)
        assert folder.is_dir()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    for maker in (temporary_dir, temporary_file, runtime.siblings.temporary_file):
        with pytest.raises(RuntimeError), maker(tmp_path / "x"):
            raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "maker"),
    [
        (d2m.siblings, temporary_file),
        (d2m.siblings, temporary_dir),
        (runtime.siblings, runtime.siblings.temporary_file),
    ],
)
def test_a_sibling_swept_before_its_lock_is_made_again(
    module: Any, maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between a name's creation and its lock, in which another process may sweep."""
    real, gone = module._lock, []

    def lock(descriptor: int) -> bool | None:
        if not gone:
            gone.extend(tmp_path.iterdir())
            for each in gone:
                each.rmdir() if each.is_dir() else each.unlink()
        return real(descriptor)  # type: ignore[no-any-return]

    monkeypatch.setattr(module, "_lock", lock)
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


def test_a_library_that_cannot_write_raises_oserror(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    with pytest.raises(OSError, match="No such file") as caught, files.library_errors():
        save_file({"x": torch.zeros(1)}, tmp_path / "none" / "x.safetensors")
    assert caught.value.errno == 2
