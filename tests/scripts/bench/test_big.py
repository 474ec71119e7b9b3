"""A synthetic model half as wide as FLUX, from nothing to a bundle: what was foretold happens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_memory_and_disk_are_within_a_quarter(tmp_path: Path) -> None:
    told = json.loads((ROOT / "d2m/families/flux/configs/flux-dev.json").read_text())
    told["transformer"] |= {"num_attention_heads": 12}
    (tmp_path / "half.json").write_text(json.dumps(told))
    command = [sys.executable, "-m", "scripts.bench.big", "--plans", ""]
    command += ["--config", str(tmp_path / "half.json"), "--work", str(tmp_path / "work")]
    subprocess.run([*command, "--json", str(tmp_path / "figures.json")], cwd=ROOT, check=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    for stage in ("convert", "export"):
        row = figures["stages"][stage]
        foretold = dict(row["foretold"])
        # A bundle's links are counted with the checkpoint, whose files they are.
        happened = row["bytes"] - (figures["bundle"]["linked_bytes"] if stage == "export" else 0)
        assert foretold["bytes"] == pytest.approx(happened, rel=0.25), stage
        assert foretold["peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.25), stage
        assert row["peak_bytes"] < 4e9
    assert not list((tmp_path / "work").iterdir())
