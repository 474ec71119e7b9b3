"""What diffusers' tests find on sparse classes is sorted: expected, refused, failed."""

import json
import sys
from pathlib import Path

import pytest

from scripts import diffusers_suite as suite

FILE = "tests/x.py::"
PASSED = {"outcome": "passed", "reason": "", "ours": False}
REFUSED = {"outcome": "failed", "reason": "ValueError: no", "ours": True}
FAILED = {"outcome": "failed", "reason": "KeyError: 0", "ours": False}
DENSE = dict.fromkeys((f"{FILE}{n}" for n in ("TestFasterCache::a", "Test::b", "Test::c")), PASSED)
DENSE[f"{FILE}Test::hub"] = FAILED
CASES = {
    "as expected": ({"TestFasterCache::a": REFUSED, "Test::hub": FAILED}, 0),
    "another reason": ({"TestFasterCache::a": FAILED}, 1),
    "refused": ({"Test::b": REFUSED}, 1),
    "failed": ({"Test::c": FAILED}, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_only_what_is_expected_passes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, code = CASES[name]
    grouped = DENSE | {FILE + test: row for test, row in changes.items()}
    monkeypatch.setattr(suite, "run", lambda *a: grouped if a[2] == "grouped" else DENSE)
    (tmp_path / suite.FOLDER).mkdir(parents=True)
    out = tmp_path / "out.json"
    arguments = ["suite", str(tmp_path), "--families", "flux", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert suite.main() == code
    found = json.loads(out.read_text())["families"]["flux"]
    assert found["sparse"]["expected"] == found["sparse"]["failed"] == {}
    told = {kind: len(found["grouped"][kind]) for kind in ("expected", "refused", "failed")}
    kinds = {"as expected": "expected", "another reason": "failed"}
    assert told == {"expected": 0, "refused": 0, "failed": 0} | {kinds.get(name, name): 1}
