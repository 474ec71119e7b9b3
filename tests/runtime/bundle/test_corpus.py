"""What once broke a reader of foreign bytes (scripts.fuzz) breaks it no more."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

from scripts.fuzz.targets import TARGETS, changed, seeds, small_kernels, small_manifest  # noqa: E402

CASES = [path for path in sorted((ROOT / "tests/corpus").rglob("*")) if path.is_file()]


def run(target: str, data: bytes) -> None:
    try:
        TARGETS[target](data)
    except ValueError as error:
        assert str(error).isprintable() and 0 < len(str(error)) < 900


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_corpus(path: Path) -> None:
    run(path.parent.name, path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_seeds(target: str) -> None:
    for data in seeds(target):
        run(target, data)


def test_what_is_changed_is_right_before() -> None:
    for target, right in (("manifest", small_manifest()), ("kernels", small_kernels())):
        assert changed(b"", right) == right
        TARGETS[target](b"")


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "library"])
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=48))
def test_any_change(target: str, data: bytes) -> None:
    run(target, data)
