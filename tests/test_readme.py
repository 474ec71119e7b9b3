"""The README's form: two commands first, one screen; README and docs name every command and extra.

What its boxes say is run by tests/test_docs.py, with the other documents.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from d2m.cli import app
from tests.cases import documents

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVERYTHING = "\n".join(path.read_text(encoding="utf-8") for path in documents.DOCUMENTS)
TEACHER = ROOT / "models/shapes-dense/model_index.json"


def commands(program: str) -> list[list[str]]:
    """Arguments of every command line in the bash boxes of all documents that calls `program`."""
    lines = [line for box in documents.boxes(language="bash") for line in box.commands()]
    rows = [documents.words(line) for line in lines]
    return [row[1:] for row in rows if row[0] == program]


def test_the_first_lines_are_the_two_commands() -> None:
    first = documents.boxes(documents.README)[0]
    assert README.startswith("```bash\n" + first.text)
    names = [line.split()[0] for line in first.text.splitlines()]
    assert names == ["./scripts/demo", "./scripts/test"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\./(scripts/[a-z]+|\.ci/run)", README))))
def test_scripts_named_are_there(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


def test_every_command_is_shown() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {arguments[0] for arguments in commands("d2m")} == names


def test_extras_named_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {e for m in re.findall(r"'\.\[([a-z,-]+)\]'", EVERYTHING) for e in m.split(",")}
    assert named == {*project["optional-dependencies"]}


def test_the_five_lines_of_a_newcomer(tmp_path: Path) -> None:
    """In a new virtual environment; packages and the build backend are those of this one."""
    pytest.importorskip("hatchling")
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("no git checkout")
    [box] = [box for box in documents.boxes(documents.README) if "git clone" in box.text]
    assert len(box.text.splitlines()) == 5
    script = box.text.replace("REPOSITORY", f"-q {ROOT}").replace("python3", sys.executable)
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_QUIET": "1"}
    environment |= {"PYTHONPATH": sysconfig.get_path("purelib"), "D2M_THREADS": "1"}
    script += "command -v d2m\npython -c 'import d2m; print(d2m.__file__)'"
    command = ["bash", "-euc", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    clone = tmp_path / "dense2moe"
    found = [str(clone / ".venv/bin/d2m"), str(clone / "d2m/__init__.py")]
    assert done.stdout.split()[-2:] == found
    assert (clone / "image.png").is_file()


def test_docker_targets_are_there() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for arguments in commands("docker"):
        if "--target" in arguments:
            target = arguments[arguments.index("--target") + 1]
            assert re.search(rf"^FROM \S+ AS {target}$", dockerfile, re.M)


def test_it_is_short_and_its_image_is_light() -> None:
    assert len(README.splitlines()) <= 150
    [image] = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert (ROOT / image).stat().st_size < 300_000
    made = json.loads((ROOT / image).with_suffix(".json").read_text())
    assert made["command"].startswith("python -m scripts.") and made["versions"]


def test_every_folder_in_its_layout_is_there() -> None:
    [layout] = re.findall(r"^## Layout\n(.*?)^## ", README, re.M | re.S)
    named = re.findall(r"`([a-z0-9]+)/`", layout)
    assert {"d2m", "calib", "export", "runtime", "scripts", "tests", "docs"} <= {*named}
    assert all((ROOT / name).is_dir() for name in named)


needs_teacher = pytest.mark.skipif(not TEACHER.is_file(), reason="no models/shapes-dense yet")


@pytest.mark.slow
@needs_teacher
def test_the_demo_leaves_a_picture_and_a_report(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--steps", "4", "--n", "6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "scripts.demo", *options]
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    for name in ("image.png", "report.html", "pairs.png", "score.json"):
        assert (tmp_path / name).is_file()
    assert (tmp_path / "sparse/model_index.json").is_file()
    assert (tmp_path / "bundle/manifest.json").is_file()
