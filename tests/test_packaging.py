"""The wheel that users install: what is in it, and what the base install asks for."""

import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = {"numpy", "onnxruntime", "tokenizers", "safetensors", "pillow", "typer", "rich"}


def name_of(requirement: str) -> str:
    for index, letter in enumerate(requirement):
        if not (letter.isalnum() or letter in "-_."):
            return requirement[:index].lower()
    return requirement.lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built by the hatchling that is installed: no build environment, no package index."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_base_install_is_the_runtime_alone() -> None:
    assert {name_of(item) for item in PROJECT["dependencies"]} == BASE


def test_all_extras_are_there() -> None:
    wanted = {"convert", "export", "trt-rtx", "trt", "gpu", "serve", "sign", "gguf"}
    wanted |= {"data", "dev", "all"}
    assert set(PROJECT["optional-dependencies"]) == wanted


def test_constraints_pin_every_direct_dependency_once() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").open()]
    pins = [line for line in lines if line]
    assert all("==" in pin and "+" not in pin for pin in pins)
    names = [name_of(pin) for pin in pins]
    assert len(names) == len(set(names))
    extras = PROJECT["optional-dependencies"]
    # tensorrt is not pinned: it comes from NVIDIA's own index, to match the driver.
    direct = {name_of(r) for rows in extras.values() for r in rows} | BASE
    assert direct - set(names) <= {"dense2moe", "tensorrt"}


def test_trt_rtx_is_pinned_exactly_and_alike() -> None:
    [pin] = [r for r in PROJECT["optional-dependencies"]["trt-rtx"] if r.startswith("tensorrt-rtx")]
    assert "==" in pin
    assert pin in (ROOT / "constraints.txt").read_text().split()


def test_the_wheel_holds_packages_presets_and_the_default_bundle(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package in ("d2m", "export", "runtime", "calib"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.relative_to(ROOT).as_posix() in names
    data = [*(ROOT / "runtime/default").rglob("*")]
    for kind in ("json", "j2", "css", "mplstyle"):
        found = list((ROOT / "d2m").rglob(f"*.{kind}"))
        assert found, kind
        data += found
    assert (ROOT / "d2m/recipe/presets/L.json").is_file()
    for path in data:
        if path.is_file():
            assert path.relative_to(ROOT).as_posix() in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"d2m", "export", "runtime", "calib", "dense2moe-0.1.0.dist-info"}


def test_the_wheels_metadata_asks_for_no_torch(wheel: zipfile.ZipFile) -> None:
    text = wheel.read("dense2moe-0.1.0.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    needs = metadata.get_all("Requires-Dist") or []
    base = {name_of(item) for item in needs if "extra ==" not in item}
    assert base == BASE
    assert metadata["License-Expression"] == "Apache-2.0"
    assert wheel.read("dense2moe-0.1.0.dist-info/licenses/LICENSE")
    points = wheel.read("dense2moe-0.1.0.dist-info/entry_points.txt").decode()
    assert "d2m = d2m.cli:main" in points


def test_nothing_names_the_package_of_somebody_else() -> None:
    """`d2m` is another project's distribution: nobody is told to install it."""
    old = r"""pip install (-[^ ]+ )*['"]?d2m([^a-z/-]|$)|['"` ]d2m\[[a-z{…]"""
    command = ["git", "grep", "-nIE", old, "--", ":!LOG.md", f":!tests/{Path(__file__).name}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "not a git repository" in found.stderr:
        pytest.skip("no git checkout")
    assert (found.returncode, found.stdout) == (1, ""), found.stdout + found.stderr


def test_version_is_said_once() -> None:
    import d2m

    assert d2m.__version__ == PROJECT["version"]
