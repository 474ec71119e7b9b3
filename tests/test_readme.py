"""The README does what it says: its commands parse, the cheap ones run, its file tree is the tree.

The whole way through its `d2m` commands, in order, is marked slow.
"""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from d2m.cli import app, main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEFAULT = ROOT / "runtime/default/manifest.json"
TEACHER = ROOT / "models/shapes-dense/model_index.json"
# What a short run puts in place of the README's figures.
SMALLER = {"--steps": "4", "--n": "12"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands(program: str) -> list[list[str]]:
    """Arguments of every command line in the bash blocks that calls `program`."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [row[1:] for row in words if row and row[0] == program]


D2M = commands("d2m")


def test_the_first_lines_are_the_two_commands() -> None:
    first = blocks("bash")[0]
    assert README.startswith("```bash\n" + first)
    assert [line.split()[0] for line in first.splitlines()] == ["./scripts/demo", "./scripts/test"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\./(scripts/[a-z]+|\.ci/run)", README))))
def test_scripts_named_are_there(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


@pytest.mark.parametrize("arguments", D2M, ids=shlex.join)
def test_d2m_commands_parse(arguments: list[str]) -> None:
    """Names, options and types are those of the command line; nothing is run."""
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]
    with command.make_context(arguments[0], arguments[1:]):
        pass


def test_every_command_is_shown() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {arguments[0] for arguments in D2M} == names


def test_inline_commands_name_real_commands() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    for line in re.findall(r"`d2m ([^`]*)`", README):
        assert line.split()[0] in names, line


def test_extras_named_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {e for m in re.findall(r"d2m\[([^\]]+)\]", README) for e in m.split(",")}
    assert named == {*project["optional-dependencies"]}


def test_docker_targets_are_there() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for arguments in commands("docker"):
        if "--target" in arguments:
            target = arguments[arguments.index("--target") + 1]
            assert re.search(rf"^FROM \S+ AS {target}$", dockerfile, re.M)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_are_python(block: str) -> None:
    ast.parse(block)


def test_the_file_tree_is_up_to_date() -> None:
    """Its remarks are the files' docstrings, so every module has one."""
    done = subprocess.run([sys.executable, "scripts/tree.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "README's file tree is old; run: python scripts/tree.py"
    [text] = re.findall(r"## The file tree\n+```\n(.*?)^```$", README, re.M | re.S)
    for line in text.splitlines():
        assert len(line.split(maxsplit=1)) == 2, f"no docstring: {line}"


needs_default = pytest.mark.skipif(not DEFAULT.is_file(), reason="no runtime/default bundle yet")
needs_teacher = pytest.mark.skipif(not TEACHER.is_file(), reason="no models/shapes-dense yet")


@needs_default
def test_the_cheap_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    prompts = [row for row in D2M if row[0] == "run" and "out/bundle" not in row]
    assert prompts
    for arguments in prompts:
        assert main(arguments) == 0
        out = arguments[arguments.index("-o") + 1]
        assert Image.open(tmp_path / out).size == (32, 32)
    (tmp_path / "runtime").symlink_to(ROOT / "runtime")
    assert main(["inspect", "runtime/default"]) == 0
    assert main(["inspect", "runtime/default", "--json"]) == 0


@needs_default
def test_the_python_block_runs_on_the_default_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [block] = [block for block in blocks("python") if "import runtime" in block]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block.replace('"out/bundle", ', ""), names)
    assert (tmp_path / "image.png").is_file()
    assert len(names["images"]) == 2  # type: ignore[arg-type]


def smaller(arguments: list[str]) -> list[str]:
    pairs = zip(["", *arguments], arguments, strict=False)
    return [SMALLER.get(before, word) for before, word in pairs]


@pytest.mark.slow
@needs_teacher
def test_the_whole_way_in_the_readmes_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every `d2m` command of the README, with fewer steps and pictures, in a fresh directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "runtime").symlink_to(ROOT / "runtime")
    for arguments in D2M:
        if arguments[0] == "serve":
            continue  # ends at a signal; tests/runtime/serve runs it
        if "--trt-rtx" in arguments and importlib.util.find_spec("tensorrt_rtx") is None:
            continue
        assert main(smaller(arguments)) == 0, shlex.join(arguments)
    assert (tmp_path / "out/image.png").is_file()
    assert (tmp_path / "out/score.json").is_file()
    assert (tmp_path / "out/grid.png").is_file()
    assert (tmp_path / "out/sparse/report.html").is_file()


@pytest.mark.slow
@needs_teacher
def test_the_demo_leaves_a_picture_and_a_report(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--steps", "4", "--n", "6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/demo.py", *options]
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    for name in ("image.png", "report.html", "grid.png", "score.json"):
        assert (tmp_path / name).is_file()
    assert (tmp_path / "sparse/model_index.json").is_file()
    assert (tmp_path / "bundle/manifest.json").is_file()
