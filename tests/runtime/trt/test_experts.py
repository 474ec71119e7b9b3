"""Blocks as segments with kernels between them: numbers, order, sizes, choice and refusals.

All but the driver call: plans are ONNX graphs, kernels numpy, both on the addresses they are given.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.directory import Bundle, open_bundle
from runtime.inspect.directory import inspect, summary_lines
from runtime.ort.component import open_component as open_ort
from runtime.pipeline import Pipeline
from runtime.trt.expert_kernels import choose_plan, make_call
from runtime.trt.experts import choose_experts, experts_of, open_experts
from runtime.trt.launch_schedule import make_launch_schedule
from tests.stand_ins.device import SIZES, TARGET, inputs
from tests.stand_ins.segments import bundle_with_segments, plans_with_cubins, rewrite

E, D = 12, 32
KERNELS = "kernels/fp32-12x32x8"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_with_segments(tiny_bundle, tmp_path_factory.mktemp("segments") / "bundle")


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(bundle.path, tmp_path / "copy")
    return Bundle(tmp_path / "copy", bundle.manifest, bundle.digest)


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-5)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("graphs", [False, True])
def test_segments_and_kernels_give_what_onnx_runtime_gives(bundle: Bundle, graphs: bool) -> None:
    """Sizes that grow, shrink and come back; every number of experts; recorded and replayed."""
    executor = plans_with_cubins(bundle, graphs=graphs)
    blocks = open_ort(bundle, "transformer", threads=1, mode="blocks")
    cases = [({}, None), ({"batch": 3}, 4), ({"image_tokens": 4, "tokens": 20}, 1), ({}, 0)]
    for seed, (sizes, k) in enumerate([*cases, ({}, None), ({}, 2)]):
        given = inputs(bundle, "transformer", seed, **sizes)
        close(executor(given, k), blocks(given, k))
    assert len(executor.device.memory) == 3  # weights, arena, scratch: nothing of the kernels' own


def test_one_block_alone(bundle: Bundle) -> None:
    executor = plans_with_cubins(bundle)
    blocks = open_ort(bundle, "transformer", threads=1, mode="blocks")
    rng = np.random.default_rng(0)
    shapes = {"temb": (2, D), "rope_cos": (24, 16), "rope_sin": (24, 16)}
    shapes |= {"hidden_states": (2, 16, D), "encoder_hidden_states": (2, 8, D)}
    given = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    for kind, prefix in (
        ("double", "transformer_blocks.1."),
        ("single", "single_transformer_blocks.0."),
    ):
        close(executor.block(kind, prefix, given, 1), blocks.block(kind, prefix, given, 1))


# ---------------------------------------------------------------- order, arguments, sizes


def test_the_schedule_replaces_sparse_blocks_alone(bundle: Bundle) -> None:
    component, plans = bundle.component("transformer"), bundle.manifest["plans"][TARGET]

    def launched(top_k: int) -> list[str]:
        made = make_launch_schedule(
            "transformer", component, plans, SIZES, top_k, plans["segments"]
        )
        return [launch.plan.partition("/")[2] for launch in made.launches]

    double = ["double.0", "double.k2.experts.0", "double.k2.experts.1", "double.1"]
    single = ["single.0", "single.k2.experts.0", "single.1"]
    assert launched(2) == ["embed", *double, *double, *single, *single, "final"]
    assert launched(0) == ["embed", *["double.k0"] * 2, *["single.k0"] * 2, "final"]


def test_launches_between_segments(bundle: Bundle) -> None:
    """Kernels, grids and addresses of a double block, in stream order, against its schedule."""
    executor = plans_with_cubins(bundle)
    executor(inputs(bundle, "transformer"), 2)
    device, seen = executor.device, []
    launch = device.launch

    def spy(function: bytes, grid: Any, block: int, shared: int, values: Any) -> None:
        seen.append((json.loads(function)["kernel"], grid, dict(zip(names_of(function), values))))
        launch(function, grid, block, shared, values)

    device.launch = spy
    executor(inputs(bundle, "transformer", 1), 2)
    kernels = ["route", "place", "up", "down", "combine"]
    assert [name for name, _, _ in seen] == kernels * 6  # two streams of 2 doubles, 2 singles
    (ready,) = executor._ready.values()
    places = [row for row in ready.bindings if ".experts." in row[0].plan]
    base, size = executor.memory.regions["scratch"]
    tokens = [32, 32, 32, 32, 64, 64]  # batch 2 of 16 image, 16 text tokens; of both together
    for i, (place, count) in enumerate(zip(places, tokens, strict=True)):
        addresses = [address for _, address in place[2]]  # x, logits, y, then the weights
        calls = seen[5 * i : 5 * i + 5]
        plan = choose_plan(executor.cubins[KERNELS].kernels, 90, count, 2)
        wanted = make_call(plan, E, count)
        assert [grid for _, grid, _ in calls] == [row.grid for row in wanted.launches]
        given = [{name: value for name, (value, _) in row.items()} for _, _, row in calls]
        assert given[0]["logits"] == addresses[1] and given[0]["T"] == count
        assert (given[2]["x"], given[2]["w1"], given[2]["b1"]) == (addresses[0], *addresses[3:5])
        assert given[3]["w"] == addresses[5] and given[4]["y"] == addresses[2]
        assert wanted.scratch <= size
        inside = [given[2]["hidden"], given[0]["gates"], given[3]["out"]]
        assert all(base <= address < base + wanted.scratch for address in inside)


def names_of(function: bytes) -> list[str]:
    return [name for name, _ in json.loads(function)["kinds"]]


# ---------------------------------------------------------------- choice


def test_what_runs_the_experts_is_chosen_and_said(
    bundle: Bundle, tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernels, reason = choose_experts(bundle, TARGET, 90)
    assert list(kernels) == [KERNELS] and reason == "kernels for sm_90"
    caplog.set_level("INFO", "runtime")
    assert experts_of(bundle, "transformer", TARGET, 90) == kernels
    assert experts_of(bundle, "transformer", TARGET, 90, "plans") == {}
    assert experts_of(bundle, "vae_decoder", TARGET, 90, "cubins") == {}  # has no experts
    assert caplog.messages == [
        "transformer: experts by cubins (kernels for sm_90)",
        "transformer: experts by plans (requested)",
    ]
    assert choose_experts(bundle, TARGET, 90, "plans") == ({}, "requested")
    assert choose_experts(bundle, TARGET, 90, "cubins")[1] == "requested"
    assert choose_experts(bundle, TARGET, 86)[0]  # code for 8.0 runs on 8.6
    kernels, reason = choose_experts(bundle, TARGET, 120)
    assert not kernels and "no kernels: " in reason and "no plan for sm_120" in reason
    with pytest.raises(ValueError, match="have no plan for sm_120, top_k 1 and 1 tokens"):
        choose_experts(bundle, TARGET, 120, "cubins")
    with pytest.raises(ValueError, match="experts is 'fast', expected one of auto, plans, cubins"):
        choose_experts(bundle, TARGET, 90, "fast")
    with pytest.raises(ValueError, match="but the backend is ort, .*leave --experts out"):
        Pipeline(tiny_bundle, "ort", experts="cubins")


def test_a_bundle_without_segments_runs_whole_plans(bundle: Bundle) -> None:
    row = {
        k: v
        for k, v in bundle.manifest["plans"][TARGET].items()
        if k not in ("segments", "experts")
    }
    old = Bundle(bundle.path, {**bundle.manifest, "plans": {TARGET: row}}, "")
    kernels, reason = choose_experts(old, TARGET, 90)
    assert not kernels and "are of whole blocks" in reason and "--cubins" in reason
    with pytest.raises(ValueError, match="export it again with --cubins"):
        choose_experts(old, TARGET, 90, "cubins")


def test_inspect_shows_both(bundle: Bundle, tiny_bundle: Path) -> None:
    (row,) = inspect(bundle.path)["plans"]
    assert row["experts"]["kernels"] == {"sm": [80, 90], "top_k": [1, 2, 4]}
    text = "\n".join(summary_lines(inspect(bundle.path)))
    assert (
        f"experts of {TARGET}: cubins where they fit the GPU, else plans (kernels for sm_80, sm_90)"
        in text
    )
    assert inspect(tiny_bundle)["plans"] == []


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["kernels.json", "sm90/up-text.cubin"])
def test_changed_kernels_are_refused(copied: Bundle, name: str) -> None:
    path = copied.path / KERNELS / name
    data = bytearray(path.read_bytes())
    data[data.index(b"90")] ^= 1  # still JSON, still as long
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="SHA-256"):
        open_bundle(copied.path)
    if name.endswith("cubin"):
        with pytest.raises(ValueError, match="SHA-256"):
            open_experts(copied, TARGET, 90)


def first(row: dict[str, Any]) -> dict[str, Any]:
    return next(iter(row["experts"].values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: first(row).update(kernels="../x"), "a directory whose kernels.json is under"),
        (lambda row: first(row).pop("kernels"), "kernels in its manifest.json is None, expected a"),
        (lambda row: first(row).update(top_k=0), ".experts.0.top_k in its manifest"),
        (lambda row: row["experts"].update(x=first(row)), "tensors.x"),
        (lambda row: row["segments"].update(x=["nothing"]), "a plan of the set or one of its"),
        (lambda row: row["segments"].update(x=[]), "a list of 1 to 64 launches"),
        (lambda row: row["segments"]["transformer/single.k2"].pop(), "a plan at the end"),
    ],
)
def test_a_wrong_manifest_is_one_sentence(copied: Bundle, change: Any, words: str) -> None:
    rewrite(copied, lambda manifest: change(manifest["plans"][TARGET]))
    with pytest.raises(ValueError, match="cannot be used") as error:
        open_bundle(copied.path)
    assert words in str(error.value)


def test_kernels_of_another_model_are_refused(bundle: Bundle) -> None:
    row = json.loads(json.dumps(bundle.manifest["plans"][TARGET]))
    for name in row["experts"]:
        row["tensors"][name]["inputs"][2]["shape"] = [E, D, 16]
    other = Bundle(bundle.path, {**bundle.manifest, "plans": {TARGET: row}}, "")
    with pytest.raises(
        ValueError, match=r"for gelu_tanh experts \[12, 32, 8\] in fp32, expected gelu_tanh experts"
    ):
        open_experts(other, TARGET, 90)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_segments_and_cubins_on_a_gpu(tiny_sparse_dir: Path, tmp_path: Path) -> None:
    """Real plans, real cubins, a real stream: what whole plans and ONNX Runtime give."""
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("triton")
    from export.bundle import export_bundle
    from runtime.trt import component as trt

    options = {"trt_rtx": True, "cubins": True, "top_k": (0, 2), "plan_dtype": "fp32"}
    export_bundle(tiny_sparse_dir, tmp_path / "b", **options)
    opened = open_bundle(tmp_path / "b")
    try:
        kinds = {
            name: trt.open_component_rtx(opened, "transformer", experts=name)
            for name in ("plans", "cubins")
        }
    except ValueError as error:  # a GPU that TensorRT-RTX does not know, such as an H200
        pytest.skip(str(error))
    whole = open_ort(opened, "transformer", threads=1)
    for batch in (1, 3):
        given = inputs(opened, "transformer", batch=batch)
        for executor in kinds.values():
            close(executor(given), whole(given))
