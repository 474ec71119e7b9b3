"""The two commands of the README, without running them whole: syntax, help, refusals, stamps."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("scripts/demo", "scripts/test", ".ci/run")


def bash(code: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", code], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}
    )


@pytest.mark.parametrize("name", [*SCRIPTS, "scripts/install.sh"])
def test_bash_accepts_it(name: str) -> None:
    assert bash(f"bash -n {name}").stderr == ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_executable_and_strict(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    text = (ROOT / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text


def test_ci_calls_the_test_script() -> None:
    assert "./scripts/test" in (ROOT / ".ci/run").read_text()


def test_no_registry_host_is_written_down() -> None:
    for name in (*SCRIPTS, "scripts/install.sh", "constraints.txt", "pyproject.toml", "Dockerfile"):
        text = (ROOT / name).read_text()
        assert "http://" not in text and "https://" not in text, name


def test_a_missing_python_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("dirname", "printf"):
        (tmp_path / "bin" / tool).symlink_to(f"/usr/bin/{tool}")
    code = f". {ROOT}/scripts/install.sh; make_venv"
    answer = subprocess.run(
        ["/bin/bash", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)},
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: no Python 3.11, 3.12 or 3.13 found")
    assert len(answer.stderr.splitlines()) == 1


def test_a_bad_torch_choice_is_one_sentence() -> None:
    answer = bash(". scripts/install.sh; has_gpu", D2M_TORCH="gpu")
    assert answer.returncode == 2
    assert answer.stderr == "error: D2M_TORCH is 'gpu', expected cpu, cuda or auto\n"


def test_an_installed_environment_is_left_alone(tmp_path: Path) -> None:
    """With a stamp of the same files nothing is installed: uv and pip are not even looked for."""
    for name in ("pyproject.toml", "constraints.txt", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    stub = "set -eu; . scripts/install.sh; make_venv() { :; }; find_uv() { echo LOOKED; exit 9; }; "
    first = bash(stub + "install x dev", cwd=tmp_path)
    assert (first.returncode, first.stdout) == (9, "LOOKED\n")
    stubs = stub.replace("exit 9; }", "UV=; }") + "get_torch() { :; }; get() { echo GOT; }; "
    second = bash(stubs + "install x dev", cwd=tmp_path)
    assert (second.returncode, second.stdout) == (0, "LOOKED\nGOT\n"), second.stderr
    third = bash(stub + "install x dev", cwd=tmp_path)
    assert (third.returncode, third.stdout) == (0, "")
    other = bash(stub + "install x export", cwd=tmp_path)
    assert other.returncode == 9


def test_pips_indexes_reach_uv(tmp_path: Path) -> None:
    """uv reads no pip configuration; what pip is configured with comes as environment variables."""
    config = tmp_path / "pip.conf"
    links = tmp_path / "wheels"
    config.write_text(
        f"[global]\nindex-url = file://{tmp_path}/simple\n"
        f"extra-index-url = file://{tmp_path}/a\n  file://{tmp_path}/b\n"
    )
    python = tmp_path / ".venv/bin"
    python.mkdir(parents=True)
    (python / "python").symlink_to(ROOT / ".venv/bin/python")
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("no .venv here")
    answer = bash(
        f"unset UV_INDEX UV_FIND_LINKS UV_DEFAULT_INDEX; . {ROOT}/scripts/install.sh; "
        'eval "$(pip_settings_for_uv)"; echo "$UV_DEFAULT_INDEX|$UV_INDEX|$UV_FIND_LINKS"',
        cwd=tmp_path,
        PIP_CONFIG_FILE=str(config),
        PIP_FIND_LINKS=str(links),
        PYTHONPATH=os.pathsep.join(p for p in __import__("sys").path if p),
    )
    default, extra, found = answer.stdout.strip().split("|")
    assert default == f"file://{tmp_path}/simple"
    assert f"file://{tmp_path}/a" in extra.split() and f"file://{tmp_path}/b" in extra.split()
    assert found == str(links)


@pytest.mark.parametrize("name", ["scripts/test", ".ci/run"])
def test_help_installs_nothing(name: str) -> None:
    answer = bash(f"./{name} --help")
    assert answer.returncode == 0
    assert answer.stdout.startswith("usage: ./scripts/test")
    assert answer.stderr == ""
