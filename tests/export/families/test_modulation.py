"""AdaLN modes single and lowrank: from the directory through the bundle, the plans and parity."""

import copy
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2m.convert.modulation_fit import compress_adaln
from d2m.model.modulation import share_adaln
from d2m.model.sparse_transformer import SparseFluxTransformer2DModel
from d2m.recipe.structure import AdaLN
from export.checkpoint.pipeline import empty_transformer
from export.checkpoint.weights import Checkpoint, place, write
from export.families.flux import FLUX, ROWS, environment
from export.graph.blocks import block_type, reads, transformer_program
from export.graph.compose import compose
from export.graph.prepare import prepare
from export.parity.run import parity
from export.plans.build import build_plans
from runtime.bundle.directory import open_bundle
from runtime.files.tensors import read_header
from runtime.inspect.directory import inspect, summary_lines
from runtime.ort.component import open_component
from runtime.trt.component import Plans
from runtime.trt.launch_schedule import make_launch_schedule
from tests.conftest import exported
from tests.stand_ins.device import (
    PROFILES,
    SIZES,
    TARGET,
    HostContext,
    HostDevice,
    bundle_with_plans,
    inputs,
)
from tests.tiny.bundle import damaged, manifest_of, program_of, relative, session
from tests.tiny.pipeline import tiny_inputs

MODES = ("single", "lowrank")
RANK = 6
D = 32


@pytest.fixture(scope="module")
def pipelines(tiny_sparse_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny sparse model with random shared modulation; lowrank's is stored in bfloat16."""
    from diffusers import DiffusionPipeline

    found = {}
    for seed, mode in enumerate(MODES):
        pipe = DiffusionPipeline.from_pretrained(tiny_sparse_dir, local_files_only=True)
        adaln = AdaLN(mode, RANK if mode == "lowrank" else None)
        model = share_adaln(pipe.transformer, adaln)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(model.named_parameters()):
            if name.startswith("modulation.") or ".table" in name or ".up." in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        model.register_to_config(adaln=adaln.mode, adaln_rank=adaln.rank)
        if mode == "lowrank":
            model.to(torch.bfloat16)
        found[mode] = tmp_path_factory.mktemp("modulation") / mode
        pipe.save_pretrained(found[mode])
    return found


@pytest.fixture(scope="module")
def bundles(pipelines: dict[str, Path], pytestconfig: pytest.Config) -> dict[str, Path]:
    return {mode: exported(pytestconfig, path, top_k=(2,)) for mode, path in pipelines.items()}


def model_of(directory: Path) -> Any:
    return SparseFluxTransformer2DModel.from_pretrained(directory / "transformer").float().eval()


def feed(model: Any, given: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A transformer's keyword inputs as its bundle takes them."""
    cos, sin = model.pos_embed(torch.cat((given["txt_ids"], given["img_ids"])))
    tensors = {n: v for n, v in given.items() if not n.endswith("_ids")}
    return {n: v.numpy() for n, v in (tensors | {"rope_cos": cos, "rope_sin": sin}).items()}


# ---------------------------------------------------------------- the bundle


@pytest.mark.parametrize("mode", MODES)
def test_the_modulation_is_computed_once_a_step(bundles: dict[str, Path], mode: str) -> None:
    """The embed call writes it, blocks read it in temb's place; norms hold a table or a Linear."""
    record = manifest_of(bundles[mode])["components"]["transformer"]
    types = record["types"]
    assert types["embed"]["outputs"][-2:] == ["temb", "modulation"]
    assert "modulation.linear.weight" in types["embed"]["weights"]
    for kind, norms in (("double", ("norm1", "norm1_context")), ("single", ("norm",))):
        assert "modulation" in types[kind]["inputs"] and "temb" not in types[kind]["inputs"]
        weights = set(types[kind]["weights"])
        assert not any("norm" in name and ".linear." in name for name in weights)
        for norm in norms:
            own = (f"{norm}.table",) if mode == "single" else (f"{norm}.up.weight",)
            assert weights.issuperset(own)
    assert "temb" in types["final"]["inputs"]
    header = read_header(bundles[mode] / "transformer.safetensors")
    width = 6 * D if mode == "single" else RANK
    assert header["modulation.linear.weight"].shape == (D, width)
    stored = {"F32"} if mode == "single" else {"BF16"}
    assert {row.dtype for name, row in header.items() if "gate" not in name} == stored


@pytest.mark.parametrize("mode", MODES)
def test_graph_and_blocks_are_torch(
    pipelines: dict[str, Path], bundles: dict[str, Path], mode: str
) -> None:
    model, bundle = model_of(pipelines[mode]), open_bundle(bundles[mode])
    executors = [
        open_component(bundle, "transformer", threads=1, mode=how) for how in ("graph", "blocks")
    ]
    for batch, image, text in ((1, 16, 8), (3, 25, 7)):
        given = tiny_inputs(batch, batch=batch, image_tokens=image, text_tokens=text)
        with torch.no_grad():
            expected = model(**given).sample
            model.modulation.linear.weight.mul_(2)
            other = model(**given).sample
            model.modulation.linear.weight.div_(2)
        assert relative(other.numpy(), expected) > 1e-2  # it matters what the modulation is
        for executor in executors:
            assert relative(executor(feed(model, given))["sample"], expected) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_parity_passes(pipelines: dict[str, Path], bundles: dict[str, Path], mode: str) -> None:
    result = parity(pipelines[mode], bundles[mode], steps=2)
    assert result["passed"], result["failures"]
    tensors = {row["tensor"] for row in result["blocks"] if row["place"].startswith("embed")}
    assert tensors == {"hidden_states", "encoder_hidden_states", "temb", "modulation"}


def test_parity_finds_a_wrong_modulation(
    pipelines: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    broken = damaged(bundles["single"], tmp_path / "b", "transformer_blocks.1.norm1.table")
    result = parity(pipelines["single"], broken, steps=1)
    bad = {row["place"] for row in result["blocks"] if not row["passed"]}
    assert bad == {"transformer_blocks.1 (step 0)"} and not result["passed"]


@pytest.mark.slow
def test_lowrank_at_full_rank_is_full(tiny_sparse_dir: Path, tmp_path: Path) -> None:
    """The dense modulation through a rotation: the composed graph gives the full model's sample."""
    full = model_of(tiny_sparse_dir)
    draws = torch.randn(200, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    moments = {"mean": draws.mean(0), "covariance": draws.T.cov()}
    model = compress_adaln(copy.deepcopy(full), AdaLN("lowrank", D), moments)
    given = tiny_inputs(5)
    with torch.no_grad():
        expected = full(**given).sample
    model.save_pretrained(tmp_path / "model")
    checkpoint, weights = Checkpoint(tmp_path / "model"), tmp_path / "w.safetensors"
    program = transformer_program(prepare(model, FLUX.tracing), FLUX.tracing, torch.float32, (2,))
    write(weights, place(program, checkpoint.dtype), checkpoint.get)
    graph = compose(program, weights, 2).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(graph)
    (sample,) = session(tmp_path / "m.onnx").run(["sample"], feed(full, given))
    assert relative(sample, expected) < 1e-5


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("mode", MODES)
def test_plans_give_what_onnx_runtime_gives(
    bundles: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    """The executor of plans, on tests/stand_ins/device.py: the modulation is one buffer of the
    arena."""
    bundle, device = bundle_with_plans(bundles[mode], tmp_path / "bundle"), HostDevice()
    executor = Plans(
        bundle, "transformer", TARGET, device, lambda _, path: HostContext(path, device)
    )
    given = inputs(bundle, "transformer")
    expected = open_component(bundle, "transformer", threads=1)(given)["sample"]
    np.testing.assert_allclose(executor(given)["sample"], expected, rtol=2e-4, atol=2e-5)
    launches = make_launch_schedule(
        "transformer", bundle.component("transformer"), bundle.manifest["plans"][TARGET], SIZES, 2
    ).launches
    shared = launches[0].outputs["out_modulation"]
    assert all(row.inputs["modulation"] is shared for row in launches[1:-1])
    assert "modulation" not in launches[-1].inputs


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize("kind", ["double", "single"])
def test_plans_are_fused_as_those_of_full(
    tiny_sparse_dir: Path, pipelines: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Built in bfloat16 without a GPU: attention one kernel, and no more kernels than in full."""
    pytest.importorskip("tensorrt_rtx")
    group = {"double": "transformer_blocks", "single": "single_transformer_blocks"}[kind]
    counts: dict[str, dict[str, int]] = {}
    for mode, directory in {"full": tiny_sparse_dir, **pipelines}.items():
        model = empty_transformer(directory)
        block, inner = getattr(model, group)[0], environment(model, torch.bfloat16)[1]
        row = ROWS[type(block).__name__]
        read, written = reads(row, inner), {name: inner[name] for name in row.outputs}
        traced = block_type(kind, block, row.call, read, written, torch.bfloat16, (2,))
        path, key = tmp_path / f"{mode}.onnx", f"transformer/{kind}.k2"
        path.write_bytes(traced.graphs["2"].SerializeToString())
        plans = build_plans({key: path}, tmp_path / mode, dtype="bfloat16", profiles=PROFILES)
        (entry,) = plans.values()
        counts[mode] = entry["layers"][key]
        shapes = {row["name"]: row["shape"] for row in entry["tensors"][key]["inputs"]}
        width = {"full": D, "single": 6 * D, "lowrank": RANK}[mode]
        name, other = ("temb", "modulation") if mode == "full" else ("modulation", "temb")
        assert shapes[name] == ["batch", width] and other not in shapes
    for mode in MODES:
        found, full = counts[mode], counts["full"]
        assert found["fused_attention"] == full["fused_attention"] == 1
        assert found["conditionals"] == found["host_copies"] == 0
        assert found["kernels"] <= full["kernels"], (mode, found, full)


# ---------------------------------------------------------------- looked at, and refused


@pytest.mark.parametrize("mode", MODES)
def test_inspect_names_the_mode(
    pipelines: dict[str, Path], bundles: dict[str, Path], mode: str
) -> None:
    rank = RANK if mode == "lowrank" else None
    words = f"AdaLN: {mode}{' of rank 6' if rank else ''}, one modulation for all blocks"
    for path in (pipelines[mode], bundles[mode]):
        info = inspect(path)
        assert info["adaln"] == {"mode": mode, "rank": rank} and words in summary_lines(info)
    counted = [
        inspect(path)["parameters"]["transformer"] for path in (pipelines[mode], bundles[mode])
    ]
    assert counted[0] == counted[1]
    total = sum(p.numel() for p in model_of(pipelines[mode]).parameters())
    assert counted[0]["total"] == total


def test_inspect_names_full_nowhere(tiny_sparse_dir: Path, tiny_bundle: Path) -> None:
    for path in (tiny_sparse_dir, tiny_bundle):
        info = inspect(path)
        assert info["adaln"] == {"mode": "full", "rank": None}
        assert not any("AdaLN" in line for line in summary_lines(info))


def edited(directory: Path, root: Path, edit: Any) -> Path:
    """A copy of a pipeline whose transformer's tensors `edit` has changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, root)
    (path,) = (root / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return root


@pytest.mark.parametrize(
    ("mode", "name", "words"),
    [
        ("single", "modulation.linear.weight", "lacks the tensor modulation.linear.weight"),
        (
            "single",
            "transformer_blocks.0.norm1.table",
            "lacks the tensor transformer_blocks.0.norm",
        ),
        ("lowrank", "single_transformer_blocks.1.norm.up.weight", "lacks the tensor single_"),
    ],
)
def test_a_checkpoint_without_a_modulation_weight(
    pipelines: dict[str, Path],
    bundles: dict[str, Path],
    tmp_path: Path,
    mode: str,
    name: str,
    words: str,
) -> None:
    source = edited(pipelines[mode], tmp_path / "p", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=words):
        write_transformer(source, bundles[mode], tmp_path / "w.safetensors")


def test_a_checkpoint_with_a_modulation_of_wrong_shape(
    pipelines: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["modulation.linear.weight"] = tensors["modulation.linear.weight"][:5].clone()

    source = edited(pipelines["lowrank"], tmp_path / "p", cut)
    words = r"modulation.linear.weight gives \[32, 5\] .*, expected \[32, 6\]"
    with pytest.raises(ValueError, match=words):
        write_transformer(source, bundles["lowrank"], tmp_path / "w.safetensors")


def write_transformer(source: Path, bundle: Path, out: Path) -> None:
    """The part of an export that reads the transformer's checkpoint."""
    checkpoint, program = Checkpoint(source / "transformer"), program_of(bundle, "transformer")
    write(out, place(program, checkpoint.dtype), checkpoint.get)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("drop", "transformer.safetensors has no tensor modulation.linear.weight"),
        ("reshape", r"tensor modulation.linear.weight has shape \[\d+, 2\], expected \[32, 192\]"),
        ("unwritten", "program.* 'modulation', expected an input of the component or output"),
    ],
)
def test_a_bundle_that_was_tampered_with(
    bundles: dict[str, Path], tmp_path: Path, change: str, words: str
) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(bundles["single"], root)
    manifest = json.loads((root / "manifest.json").read_text())
    types = manifest["components"]["transformer"]["types"]
    if change == "unwritten":
        types["embed"]["outputs"].remove("modulation")
    else:
        path = root / "transformer.safetensors"
        data, name = path.read_bytes(), b"modulation.linear.weight"
        found = re.search(rb'"modulation.linear.weight":{"dtype":"F32","shape":\[32,192\]', data)
        assert found
        if change == "drop":
            new = found[0].replace(name, b"modulation.linear.weighs")
        else:  # of the same number of bytes in the header, and of the same number of weights
            new = found[0].replace(b"[32,192]", b"[3072,2]")
        data = data[: found.start()] + new + data[found.end() :]
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"]["transformer.safetensors"]["sha256"] = digest
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=words):
        open_bundle(root)
