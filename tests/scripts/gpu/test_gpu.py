"""The GPU benchmark at toy size on the CPU, its tables and drawing, and gpu.sh's refusals."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from tests.cases.fresh_process import python

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[3]


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return python("-m", name, *arguments, env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "bench_gpu.json"
    done = script(
        "scripts.gpu", "--toy", "--sections", "ceilings,correctness,layer", "--json", path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_every_cell_ran_or_says_why(measured: Path) -> None:
    answer = json.loads(measured.read_text())
    cells = answer["cells"]
    assert [name for name, row in cells.items() if "failed" in row] == []
    assert {"date", "machine", "setting", "command"} <= set(answer)
    checks = [row for name, row in cells.items() if name.startswith("correctness/")]
    assert all(row.get("ok", True) for row in checks) and any("ok" in row for row in checks)
    assert cells["layer/B2/skewed/training/sorted"]["tflops"] > 0
    assert "the tensors are on cpu" in cells["layer/B1/uniform/forward/triton"]["skipped"]


def test_a_second_run_measures_nothing_again(measured: Path) -> None:
    before = json.loads(measured.read_text())["cells"]
    done = script("scripts.gpu", "--toy", "--sections", "ceilings,correctness", "--json", measured)
    assert done.returncode == 0 and json.loads(measured.read_text())["cells"] == before
    later = script(
        "scripts.gpu", "--toy", "--sections", "blocks", "--seconds", 0, "--json", measured
    )
    assert later.returncode == 3 and "8 left" in later.stdout


def test_tables_and_drawing(measured: Path) -> None:
    done = script("scripts.gpu.roofline", measured)
    assert done.returncode == 0, done.stderr
    assert "| step L | 1.33 | not measured |" in done.stdout
    assert "| layer/B1/uniform/forward/dense |" in measured.with_suffix(".md").read_text()
    drawing = ET.parse(measured.with_name("roofline.svg")).getroot()
    marks = [node for node in drawing.iter() if node.tag.endswith("}use")]
    words = [node.text for node in drawing.iter() if node.tag.endswith("}text")]
    assert len(marks) >= 2 * 6  # a contender in the drawing and in its legend
    assert "TFLOP/s" in words and any(word.startswith("sorted, B1: ") for word in words)


def test_without_matplotlib_there_are_tables(measured: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    copy = tmp_path / "bench_gpu.json"
    copy.write_bytes(measured.read_bytes())
    command = [sys.executable, "-m", "scripts.gpu.roofline", copy]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr.startswith("no plot: ")
    assert copy.with_suffix(".md").is_file() and not copy.with_name("roofline.svg").exists()


@pytest.mark.slow
def test_everything_from_end_to_end_on_a_bare_machine(tmp_path: Path) -> None:
    """scripts/gpu.sh --toy without what a GPU machine has not: every cell, kernels interpreted."""
    pytest.importorskip("triton")
    absent = "dict.fromkeys(('diffusers', 'onnx', 'onnxscript', 'tensorrt', 'tensorrt_rtx'))"
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update({absent})\n")
    env = {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    command = ["bash", str(ROOT / "scripts/gpu.sh"), "--toy"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0 and done.stdout.endswith("== all well\n"), done.stdout[-3000:]
    answer = json.loads((tmp_path / "out/bench_gpu.json").read_text())
    cells = answer["cells"]
    assert [(n, r) for n, r in cells.items() if "failed" in r or "skipped" in r] == []
    sections = {name.split("/")[0] for name in cells}
    assert sections == {"ceilings", "correctness", "layer", "blocks", "step", "shapes"}
    assert all(row["ok"] for name, row in cells.items() if name.startswith("correctness/"))
    steps = ["dense", *"LMS", "XS"]
    assert {n for n in cells if n.startswith("step/")} == {
        f"step/{name}{tail}" for name in steps for tail in ("", " compiled")
    }
    assert {f"layer/B2/uniform/end/{name}" for name in ("apart", "fused")} <= set(cells)
    pictures = [cells[f"shapes/torch{tail}"]["psnr_to_ort"] for tail in ("", " compiled")]
    assert all(psnr is None or psnr > 50 for psnr in pictures)  # None: the same picture
    table = (tmp_path / "out/bench_gpu.md").read_text()
    assert "nothing measured of a GPU" in table and "| step L | 1.33 | not measured |" in table
    ET.parse(tmp_path / "out/roofline.svg")
    refusal = (tmp_path / "out/rtx-plan.log").read_text()
    assert refusal.startswith("error: ") and refusal.count("\n") == 1


def test_the_torch_transformer_is_the_bundles() -> None:
    """What is timed is FLUX: the shapes model's weights give what ONNX Runtime gives."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from runtime.bundle.directory import open_bundle
    from runtime.opened import default_bundle
    from runtime.ort.component import open_component
    from scripts.gpu.shapes import Transformer, load_bundle

    bundle, rng = open_bundle(default_bundle()), np.random.default_rng(0)
    sizes = {"batch": 2, "image_tokens": 16, "text_tokens": 16, "tokens": 32}
    given = {}
    for name, row in bundle.component("transformer")["inputs"].items():
        shape = [sizes[d] if isinstance(d, str) else d for d in row["shape"]]
        given[name] = rng.standard_normal(shape).astype(np.float32)
    device, k = torch.device("cpu"), bundle.manifest["top_k"]
    mine = Transformer(load_bundle(bundle, k, device, torch.float32), device, torch.float32, False)
    found = mine(given)["sample"]
    wanted = open_component(bundle, "transformer", threads=1)(given)["sample"]
    assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted)


def test_it_draws_as_the_runtime_does() -> None:
    """The whole pipeline, its transformer in torch, gives ONNX Runtime's picture."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from runtime.pipeline import Pipeline
    from scripts.gpu.shapes import pipeline

    given = {"steps": 4, "seed": 3}
    drawn = pipeline(torch.device("cpu"), torch.float32)
    mine = np.asarray(drawn("a red circle above a blue square", **given), np.float64)
    other = Pipeline(None, "ort", threads=1)("a red circle above a blue square", **given)
    assert ((mine - np.asarray(other, np.float64)) ** 2).mean() < 0.65  # 50 dB
    with pytest.raises(ValueError, match="top_k is 1, kappa 1; this transformer was loaded"):
        drawn("a red circle", top_k=1, **given)


def test_refusals_are_one_sentence() -> None:
    done = script("scripts.gpu")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: torch sees no GPU, expected one")
    done = script("scripts.gpu", "--sections", "colour")
    assert done.returncode == 2 and "--sections has colour, expected some of" in done.stderr
    done = script("scripts.gpu.roofline", "nowhere.json")
    assert done.returncode == 2 and "the JSON file is nowhere.json" in done.stderr
    for arguments, code in ((["--help"], 0), (["soon"], 2), (["--toy", "5", "6"], 2)):
        shell = subprocess.run(
            ["bash", ROOT / "scripts/gpu.sh", *arguments], capture_output=True, text=True
        )
        assert shell.returncode == code and "usage: scripts/gpu.sh [--toy] [SECONDS]" in (
            shell.stdout + shell.stderr
        )
