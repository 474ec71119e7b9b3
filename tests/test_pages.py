"""The boxes of docs/data.md and docs/lora.md, from top to end, with a tiny pipeline as the teacher.

tests/test_docs.py runs the same with the shapes teacher, as a slow test.
"""

import json
from pathlib import Path

import pytest

from tests.cases.documents import ROOT, SMALLER, boxes, run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory where models/shapes-dense is a tiny pipeline."""
    pytest.importorskip("diffusers")
    from tests.tiny.pipeline import tiny_pipeline

    monkeypatch.chdir(tmp_path)
    path = tiny_pipeline("models/shapes-dense")
    defaults = {"num_inference_steps": 2, "height": 16, "width": 16}
    (path / "defaults.json").write_text(json.dumps(defaults))
    vae = json.loads((path / "vae/config.json").read_text())
    vae["sample_size"] = 32  # the smallest shapes world
    (path / "vae/config.json").write_text(json.dumps(vae))
    return tmp_path


def run_all(page: str) -> None:
    names: dict[str, object] = {}
    for box in boxes(ROOT / "docs" / page):
        if box.language == "python":
            exec(box.text, names)
        for command in box.commands() if box.language == "bash" else ():
            run(command, {}, short=True)


@pytest.mark.slow
def test_the_page_about_data(place: Path) -> None:
    """Afterwards four conversions, a report with the data's captions and a cache are there."""
    pytest.importorskip("datasets", reason="the extra data is not installed")
    run_all("data.md")
    made = {path.parent.name for path in Path("out").glob("*/recipe.json")}
    assert made == {"from-folder", "from-shards", "from-dataset", "data-free"}
    report = json.loads(Path("out/from-folder/report.json").read_text())
    captions = {file.read_text().strip() for file in Path("out/pictures").glob("*.txt")}
    assert {image["prompt"] for image in report["images"]} <= captions and report["routing"]
    kinds = {path.name for path in Path("out/cache").iterdir()}
    assert kinds >= {"latents", "text", "trajectories"}


def test_the_page_about_loras(place: Path) -> None:
    run_all("lora.md")
    steps = int(SMALLER["--steps"])  # of `d2m lora` too
    for name in ("dense-8", "sparse-8", "sparse-8-free"):
        defaults = json.loads(Path(f"out/{name}/defaults.json").read_text())
        assert defaults["num_inference_steps"] == steps and defaults["height"] == 16
    assert "style.safetensors" in Path("out/styled/README.md").read_text()
