"""The command that installs an extra is right for how d2m was installed."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from runtime.files import extras
from runtime.files.extras import command, need

ROOT = Path(extras.__file__).parents[2]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Pretend that the distribution's record is such, or that it has none."""

    def pretend(record: object) -> None:
        class Found:
            @staticmethod
            def read_text(name: str) -> str | None:
                assert name == "direct_url.json"
                return None if record is None else json.dumps(record)

        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Found)

    monkeypatch.chdir(tmp_path)
    return pretend


def test_from_a_clone(installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = (tmp_path / "my clone").as_uri()
    installed({"url": url, "dir_info": {"editable": True}})
    assert command("export") == f"pip install -e '{tmp_path}/my clone[export]'"
    installed({"url": tmp_path.as_uri(), "dir_info": {"editable": True}})  # where we are
    assert command("export") == "pip install -e '.[export]'"
    assert command() == "pip install -e ."
    installed({"url": tmp_path.as_uri(), "dir_info": {}})
    assert command("export,serve") == "pip install '.[export,serve]'"


def test_from_an_address(installed) -> None:
    url = "https://example.org/dense2moe"
    installed({"url": url, "vcs_info": {"vcs": "git", "commit_id": "1234abcd"}})
    assert command("serve") == f"pip install 'dense2moe[serve] @ git+{url}@1234abcd'"
    installed({"url": f"{url}-1.whl", "archive_info": {}})
    assert command("serve") == f"pip install 'dense2moe[serve] @ {url}-1.whl'"
    installed(None)  # by name, from where pip looks
    assert command("serve") == "pip install 'dense2moe[serve]'"
    assert command() == "pip install dense2moe"


def test_never_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.chdir(tmp_path)
    assert command("dev") == f"pip install -e '{ROOT}[dev]'"
    monkeypatch.chdir(ROOT)
    assert command("dev") == "pip install -e '.[dev]'"


def test_the_sentence() -> None:
    said = need("sign", "signatures need cryptography", ImportError("No module named 'x'"))
    assert said.startswith("signatures need cryptography (No module named 'x'); install with: pip ")
    assert need("sign", "it needs that") == f"it needs that; install with: {command('sign')}"
