"""What a machine is, and stages against it: figures are of this machine, bounds are of any."""

import json
from pathlib import Path

import pytest

from d2m.cli import main
from d2m.families.encoders import T5_XXL
from d2m.plan import fits_here as early
from d2m.plan import machine
from d2m.plan.fits_here import needs, needs_table
from d2m.plan.model_config import subject_of
from d2m.plan.needs import Needs, block_stacks, convert_needs, run_needs
from d2m.units import GB, bytes_text
from runtime.files.extras import command

ROOT = Path(__file__).resolve().parents[3]
LARGE = {
    "cores": 8,
    "ram": 256 * GB,
    "ram_available": 150 * GB,
    "disk_free": 1000 * GB,
    "disk_speed": 1e9,
    "flops": 5e11,
    "share": 1.0,
    "gpus": [],
}


def test_this_machine(tmp_path: Path) -> None:
    found = machine.machine(tmp_path / "not" / "yet")
    assert 1 <= found["cores"] <= 4096
    assert 1e8 < found["flops"] < 1e15 and 0 < found["share"] <= 1
    assert found["disk_speed"] > 1e5 and found["disk_free"] > 0
    assert 0 < found["ram_available"] <= found["ram"]
    assert not list(tmp_path.iterdir())


def test_gpus_are_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program of the driver's name that says what the driver's does."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'Card A, 24564, 20000, 570.1, 8.9'\necho 'B, [N/A], 1, 2, 3'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (card,) = machine.gpus()
    assert card == {
        "name": "Card A", "memory": 24564 << 20, "free": 20000 << 20, "driver": "570.1", "sm": 89
    }  # fmt: skip
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpus() == []


def test_memory_follows_a_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 1000 kB\nMemFree: 5 kB\nMemAvailable: 600 kB\n",
        "/sys/fs/cgroup/memory.max": "409600\n",
        "/sys/fs/cgroup/memory.current": "204800\n",
    }

    def read(self: Path, *args: object) -> str:
        if str(self) not in files:
            raise FileNotFoundError(str(self))
        return files[str(self)]

    monkeypatch.setattr(Path, "read_text", read)
    assert machine.memory() == (409600, 204800)
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.memory() == (1000 * 1024, 600 * 1024)
    del files["/proc/meminfo"]
    assert machine.memory() is None


def test_flux_by_the_numbers() -> None:
    """FLUX.1 [dev]: a streamed conversion stays under 4 GB, a trained one needs what it needs."""
    streamed = convert_needs("flux-dev", preset="L")
    assert 2e9 < streamed.ram < 4e9 and 26e9 < streamed.disk < 29e9
    trained = convert_needs("flux-dev", preset="L", streamed=False)
    assert trained.ram > 4 * 11.9e9 + 16 * 9e9
    drawn = run_needs("flux-dev", preset="L", steps=28)
    assert 28 * 49e12 < drawn.flops < 28 * 50e12 and drawn.vram and 27e9 < drawn.vram < 34e9
    small = run_needs("flux-dev", preset="L", height=512, width=512)
    assert small.ram < drawn.ram and small.flops < drawn.flops


def test_what_fits(tiny_dense_dir: Path, tiny_sparse_dir: Path) -> None:
    rows = needs("flux-dev", LARGE, preset="L")
    assert [row["stage"] for row in rows] == [
        "convert --init-only", "convert", "export --trt-rtx", "run", "run --offload block"
    ]  # fmt: skip
    assert [row["fits"] for row in rows] == [True, False, True, True, True]
    assert "of memory, 150.0 GB available" in rows[1]["obstacle"]
    assert "block by block" in rows[1]["cure"] and rows[1]["seconds"] is None
    small = {**LARGE, "disk_free": GB, "share": 0.1}
    slow = needs("flux-dev", small, preset="L")
    assert "of disk, 1.0 GB free" in slow[0]["obstacle"]
    assert slow[0]["seconds"] > 5 * rows[0]["seconds"]
    card = {"name": "c", "memory": 24 * GB, "free": 23 * GB, "driver": "1", "sm": 89}
    run = needs("flux-dev", {**LARGE, "gpus": [card]}, preset="L")[-2]
    assert not run["fits"] and "of GPU memory, 23.0 GB free" in run["obstacle"]
    assert run["cure"].startswith("run with --offload block, a preset with fewer parameters (M, S")
    *_, run, _ = needs("flux-dev", {**LARGE, "ram_available": 16 * GB}, preset="XS")
    assert run["cure"] == "a smaller image, or another machine"  # XS is the smallest
    _, header, cells = needs_table(rows)
    assert all(len(row) == len(header) for row in cells) and cells[0][-1] == "yes"
    assert [row["stage"] for row in needs(tiny_sparse_dir, LARGE)] == [
        "export --trt-rtx", "run", "run --offload block"
    ]  # fmt: skip
    assert all(row["fits"] for row in needs(tiny_dense_dir, LARGE, preset="L"))


def test_offloading_as_it_was_measured() -> None:
    """results/big/offload.json has FLUX.1's width; T5, which it has not, decides at full size."""
    rows = json.loads((ROOT / "results/big/offload.json").read_text())["modes"]
    rooms = next(row["rooms_bytes"] for row in rows if row["mode"] == "block")
    stacks = block_stacks(subject_of("flux-dev"))
    largest = max(sum(weight.size for weight in stack.weights) for stack in stacks)
    assert 2 * 4 * largest == pytest.approx(rooms, rel=0.01)
    found = run_needs("flux-dev", preset="L", offload=True)
    whole = run_needs("flux-dev", preset="L")
    assert 4 * T5_XXL.bundled < found.ram < 4 * T5_XXL.bundled + GB and found.ram < whole.ram / 2


def test_refusals_name_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Needs("convert", 8 * GB, 3 * GB, 1.0, "the sum of things")
    monkeypatch.setattr(early, "disk_free", lambda path: 2 * GB)
    monkeypatch.setattr(early, "memory", lambda: (16 * GB, 12 * GB))
    match = "writes 3.0 GB to .* 2.0 GB are free: delete .*, or: do else"
    with pytest.raises(OSError, match=match):
        early.check_room(ask, tmp_path, "do else")
    early.check_room(ask, tmp_path, "", done=2 * GB)  # a resume: the most is there
    monkeypatch.setattr(early, "disk_free", lambda path: 4 * GB)
    early.check_room(ask, tmp_path, "")
    monkeypatch.setattr(early, "memory", lambda: (16 * GB, 5 * GB))
    with pytest.raises(
        OSError, match="about 8.0 GB of memory .the sum of things., .* 5.0 GB are available"
    ):
        early.check_room(ask, tmp_path, "")
    monkeypatch.setattr(early, "memory", lambda: (16 * GB, 7 * GB))  # the formula may be wrong
    early.check_room(ask, tmp_path, "")


@pytest.mark.parametrize("stage", ["convert", "export"])
def test_commands_refuse_before_they_start(
    stage: str,
    tiny_dense_dir: Path,
    tiny_sparse_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(early, "disk_free", lambda path: 1000)
    out = str(tmp_path / "out")
    if stage == "convert":
        given = [str(tiny_dense_dir), "-o", out, "--init-only", "--importance", "magnitude"]
    else:
        given = [str(tiny_sparse_dir), "-o", out]
    assert main([stage, *given]) == 2
    told = capsys.readouterr().err
    assert f"{stage} writes " in told and "choose an output on another disk" in told
    assert not list(tmp_path.iterdir())


def test_plan_and_doctor_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "flux-dev", "--preset", "L", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["activated_params"] and len(answer["needs"]) == 5
    assert main(["plan", "flux-dev", "--preset", "L"]) == 0
    assert "convert --init-only" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["packages"]["numpy"]["works"] and answer["backends"]["ort"]["works"]
    assert answer["extras"]["base"] and answer["advice"]
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "backend ort: works" in told and "advice: " in told


def test_doctor_finds_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2m.plan.doctor import backend, state

    (tmp_path / "brokenlibrary.py").write_text("raise RuntimeError('no such symbol')\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = state("brokenlibrary")
    assert found == {"version": None, "works": False, "reason": "RuntimeError: no such symbol"}
    assert state("absentlibrary")["reason"] == "not installed"
    row = backend("trt", state("absentlibrary"), "trt", {"gpus": []})
    assert row == {"works": False, "reason": f"not installed; install with: {command('trt')}"}
    works = {"version": "1", "works": True, "reason": None}
    assert "builds plans, runs none" in backend("trt-rtx", works, "", {"gpus": []})["reason"]
    assert backend("ort", works, "", {"gpus": []})["works"]


def test_shown() -> None:
    assert [bytes_text(size) for size in (12.34e9, 840e6, 1000)] == ["12.3 GB", "840 MB", "0 MB"]
