"""JSON of unknown origin: one clear sentence for whatever is wrong with a file."""

from pathlib import Path

import pytest

from runtime.files.checked_json import MAX_VALUES, read_json


def test_an_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, "\u00e9"]}', "utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, "\u00e9"]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON .*utf-8"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": 1, "a": 2}', "a key appears twice"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[" + b"0," * MAX_VALUES + b"0]", "more than 2000000 values"),
        (b"[]", r"holds \[\], expected a JSON object"),
        (b'{"a": 1}' + b" " * 100, "has more than 50 bytes"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        read_json(path, "the index", most=50 if data.endswith(b" " * 100) else 1 << 23)
    assert str(caught.value).startswith(f"the index {path} ") and "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^recipe .*a\.json is missing"):
        read_json(tmp_path / "a.json", "recipe")
    with pytest.raises(FileNotFoundError, match="is missing"):
        read_json(tmp_path)


def test_configs_of_diffusers_may_hold_infinities(tmp_path: Path) -> None:
    """DPMSolverMultistepScheduler's default config has lambda_min_clipped -Infinity."""
    path = tmp_path / "scheduler_config.json"
    path.write_text('{"lambda_min_clipped": -Infinity}')
    assert read_json(path, infinite=True) == {"lambda_min_clipped": float("-inf")}
    with pytest.raises(ValueError, match="-Infinity is no JSON number"):
        read_json(path)
