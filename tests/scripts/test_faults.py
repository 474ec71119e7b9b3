"""scripts/faults/__main__.py, a few tries of everything; `--kills 300` is what one runs by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases.fresh_process import python

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")
@pytest.mark.slow
def test_a_few_of_every_fault(tiny_sparse_dir: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "faults.json"
    like = ["--like", str(tiny_sparse_dir), str(tiny_bundle)]
    command = ["-m", "scripts.faults", "--short", "--json", report, *like]
    done = python(*command, env={"TMPDIR": str(tmp_path)})
    assert report.is_file(), done.stderr[-3000:]
    answer = json.loads(report.read_text())
    failures = {name: row["failures"] for name, row in answer["cases"].items() if row["failures"]}
    assert not failures and done.returncode == 0
    assert answer["kills"] >= 2
    assert not list(tmp_path.glob("d2m-faults-*"))


@pytest.mark.slow
def test_a_few_tries_with_a_wrong_clock(
    tiny_sparse_dir: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Without libfaketime it says so (quick: tests/runtime/serve/test_clock.py)."""
    report = tmp_path / "clock.json"
    like = ["--like", str(tiny_sparse_dir), str(tiny_bundle)]
    command = [sys.executable, "-m", "scripts.faults", "--clock", "--short"]
    command += ["--json", str(report), *like]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    if not report.is_file():
        assert "no libfaketime: nothing was tried" in done.stdout
        pytest.skip("no libfaketime (Debian: apt-get install faketime)")
    answer = json.loads(report.read_text())
    assert answer["clock"] == "by libfaketime" and answer["failures"] == 0
    assert answer["cases"]["system clock, run"]["jumped_within"] >= 1
