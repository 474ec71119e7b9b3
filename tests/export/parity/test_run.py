"""Parity as a test: the tiny bundle equals torch, and one wrong weight is found and named."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2m.families import FLUX
from export.parity.compare import compare, measure, psnr
from export.parity.expert_agreement import agreement, chosen
from export.parity.run import LIMITS, failures, parity, tables
from export.parity.tapped_bundle import tap, tapped_bundle, tapped_plans
from export.plans.build import default_profiles
from runtime.bundle.directory import open_bundle
from runtime.opened import Opened
from runtime.trt.launch_schedule import make_launch_schedule, one_call
from tests.conftest import exported
from tests.tiny.bundle import damaged

STEPS = 4


@pytest.fixture(scope="module")
def result(tiny_sparse_dir: Path, tiny_bundle: Path) -> dict[str, Any]:
    return parity(tiny_sparse_dir, tiny_bundle, steps=STEPS)


# ---------------------------------------------------------------- the whole


def test_the_bundle_equals_torch(result: dict[str, Any]) -> None:
    assert result["passed"] and result["failures"] == []
    assert result["dtype"] == "float32" and result["limits"] == LIMITS["float32"]
    worst = result["blocks"][0]
    assert 0 < worst["relative_error"] < 1e-4 and worst["cosine"] > 0.999999
    places = {row["place"].partition(" ")[0] for row in result["blocks"]}
    assert {"embed", "final", "transformer_blocks.1", "single_transformer_blocks.0"} <= places
    errors = [row["relative_error"] for row in result["blocks"]]
    assert errors == sorted(errors, reverse=True)
    components = {row["place"] for row in result["components"]}
    assert components == {
        "text_encoder",
        "text_encoder_2",
        "transformer",
        "vae_decoder",
        "vae_encoder",
    }


def test_weights_stored_in_half_are_compared_as_they_are_stored(
    tiny_sparse_dir: Path, pytestconfig: pytest.Config
) -> None:
    """Rounding that was asked for is no error: `--storage bf16` of weights made in float32."""
    from export.parity.torch_recording import as_stored, load_reference

    bundle = exported(pytestconfig, tiny_sparse_dir, top_k=(2,), storage="bf16")
    found = parity(tiny_sparse_dir, bundle, steps=2)
    assert found["passed"], found["failures"]
    opened = open_bundle(bundle)
    pipe = load_reference(tiny_sparse_dir, "sparse", 2)
    before = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
    as_stored(pipe, opened)
    kept = {n for n, p in pipe.transformer.named_parameters() if p.equal(before[n])}
    exact = {n for n, b in before.items() if b.equal(b.bfloat16().float())}
    assert {n for n in kept - exact if not n.endswith("gate.weight")} == set()


@pytest.mark.slow
def test_a_bundle_in_half_precision_is_within_its_own_limits(
    tiny_sparse_dir: Path, pytestconfig: pytest.Config
) -> None:
    """Graphs in float16 take what torch recorded in float32: cast to what each of them reads."""
    bundle = exported(pytestconfig, tiny_sparse_dir, top_k=(2,), dtype="fp16")
    found = parity(tiny_sparse_dir, bundle, steps=2)
    assert found["dtype"] == "float16" and found["limits"] == LIMITS["float16"]
    assert found["passed"], found["failures"]
    assert found["blocks"][0]["relative_error"] > 1e-5  # it is not float32 that was compared


@pytest.mark.parametrize("quant", ["int8", "nvfp4"])
def test_a_quantised_bundle_is_torch_that_quantises_too(
    tiny_sparse_dir: Path, pytestconfig: pytest.Config, quant: str
) -> None:
    """As tight as float32, where a last bit makes no number fall to the other side of an edge."""
    bundle = exported(pytestconfig, tiny_sparse_dir, top_k=(0, 2), quant=quant, keep=["*.1.attn.*"])
    found = parity(tiny_sparse_dir, bundle, steps=1)
    assert found["passed"], found["failures"]
    assert found["blocks"][0]["relative_error"] < 5e-3
    errors = sorted(row["relative_error"] for row in found["blocks"])
    assert errors[len(errors) // 2] < 1e-6
    cost = {row["place"]: row["relative_error"] for row in found["quantisation"]["blocks"]}
    within = {"int8": (5e-3, 5e-2), "nvfp4": (1e-2, 4e-1)}[quant]
    blocks = {place: error for place, error in cost.items() if "blocks" in place}
    assert all(within[0] < error < within[1] for error in blocks.values()), blocks
    assert cost["embed (step 0)"] < 1e-6 and cost["final (step 0)"] < 1e-6  # they are kept
    with pytest.raises(ValueError, match=f"has {quant} weights, to which a LoRA cannot be added"):
        Opened(bundle).set_loras({"any.safetensors": 1.0})


def test_experts_agree(result: dict[str, Any]) -> None:
    experts = result["experts"]
    assert experts["sure_agreement"] == 1 and experts["sure_tokens"] > experts["tokens"] / 2
    assert len(experts["sites"]) == 6 * 3  # routers x recorded steps
    assert all(row["logits_max_abs"] < 1e-4 for row in experts["sites"])


def test_the_trajectory_ends_in_the_same_picture(result: dict[str, Any]) -> None:
    steps = result["trajectory"]["steps"]
    assert [row["step"] for row in steps] == list(range(STEPS))
    assert all(row["relative_error"] < 1e-4 for row in steps)
    assert min(result["trajectory"]["image_psnr"]) > 45


def test_the_result_is_json_and_a_table(result: dict[str, Any]) -> None:
    from rich.console import Console

    json.dumps(result, allow_nan=False)
    console = Console(width=120, file=io.StringIO())
    for part in tables(result):
        console.print(part)
    text = console.file.getvalue()
    assert "worst first" in text and "against torch (float32): passed" in text


def test_a_wrong_weight_is_found_and_named(
    tiny_sparse_dir: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    broken = damaged(tiny_bundle, tmp_path / "b", "transformer_blocks.1.ff.shared.fc2.weight")
    result = parity(tiny_sparse_dir, broken, steps=1)
    assert not result["passed"]
    bad = {row["place"] for row in result["blocks"] if not row["passed"]}
    assert bad == {"transformer_blocks.1 (step 0)"}
    assert result["blocks"][0]["tensor"] == "hidden_states"
    assert "the worst is hidden_states of transformer_blocks.1" in " ".join(result["failures"])


def test_another_number_of_experts(tiny_sparse_dir: Path, tiny_bundle: Path) -> None:
    result = parity(tiny_sparse_dir, tiny_bundle, steps=1, top_k=4, prompts=["a red circle"])
    assert result["passed"] and result["top_k"] == result["experts"]["top_k"] == 4
    assert parity(tiny_sparse_dir, tiny_bundle, steps=1, top_k=0)["experts"] is None


def test_a_dense_bundle(tiny_dense_dir: Path, tiny_dense_bundle: Path) -> None:
    result = parity(tiny_dense_dir, tiny_dense_bundle, steps=2)
    assert result["passed"] and result["experts"] is None and result["top_k"] is None


def test_a_bundle_of_another_pipeline(tiny_dense_dir: Path, tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="the pipeline .* is dense, the bundle is sparse"):
        parity(tiny_dense_dir, tiny_bundle, steps=1)


# ---------------------------------------------------------------- the parts


def test_chosen_experts_and_their_margin() -> None:
    logits = np.log([[0.5, 0.2, 0.3], [0.2, 0.4, 0.4], [0.4, 0.2, 0.4]])
    experts, margin = chosen(logits, 1)
    np.testing.assert_array_equal(experts, [[0], [1], [0]])  # ties: the lowest index
    np.testing.assert_allclose(margin, [0.2, 0, 0], atol=1e-12)
    experts, margin = chosen(logits, 2)
    np.testing.assert_array_equal(experts, [[0, 2], [1, 2], [0, 2]])
    assert np.isinf(chosen(logits, 3)[1]).all()


def test_a_flip_counts_as_wrong_only_where_the_margin_is_wide() -> None:
    near = np.array([[1.0, 1.0 + 1e-6, 0.0]])
    far = np.array([[2.0, 1.0, 0.0]])
    swapped = far[:, [1, 0, 2]]
    found = agreement([("a", near, near[:, [1, 0, 2]]), ("b", far, far)], 1, 1e-4)
    assert (found["flips"], found["sure_agreement"], found["sure_tokens"]) == (1, 1.0, 1)
    assert 0 < found["largest_flip_margin"] < 1e-6
    found = agreement([("a", far, far), ("b", far, swapped)], 1, 1e-4)
    assert found["sure_agreement"] == 0.5 and found["sites"][0]["site"] == "b"


def test_tapped_graphs_give_logits_besides(tiny_bundle: Path, tmp_path: Path) -> None:
    import onnx

    bundle = open_bundle(tiny_bundle)
    kinds = bundle.component("transformer")["types"]
    model = onnx.load(str(bundle.file(kinds["double"]["graphs"]["2"])))
    tapped, names = tap(model, FLUX)
    assert sorted(names) == ["ff.logits", "ff_context.logits"]
    assert len(tapped.graph.output) == len(model.graph.output) + 2
    onnx.checker.check_model(tapped)
    copied = tapped_bundle(bundle, tmp_path, 2)
    row = copied.component("transformer")["types"]["single"]
    assert row["outputs"][-1] == "proj_mlp.logits"
    assert kinds["single"]["outputs"] == row["outputs"][:-1]


@pytest.mark.tensorrt
def test_tapped_plans_are_built(tiny_sparse_dir: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Without a GPU they can be built, not run; their tensors say what a runtime would get."""
    pytest.importorskip("tensorrt_rtx")
    bundle = open_bundle(tiny_bundle)
    bundle.manifest["plans"] = {
        "trt-rtx-portable": {
            "api": "tensorrt_rtx",
            "compute_capabilities": [],
            "dtype": "float32",
            "profiles": default_profiles(bundle.manifest),
        }
    }
    tapped = tapped_plans(bundle, tmp_path, 2, tiny_sparse_dir, "trt-rtx-portable")
    sizes = {"batch": 2, "image_tokens": 16, "text_tokens": 16, "tokens": 32}
    plans = tapped.manifest["plans"]["trt-rtx-portable"]
    single = one_call(
        tapped.component("transformer"), "single", "a.", plans["tensors"]["transformer/single.k2"]
    )
    schedule = make_launch_schedule("transformer", single, plans, sizes, 2)
    assert schedule.outputs["proj_mlp.logits"].shape == (64, 12)
    assert schedule.outputs["hidden_states"].shape == (2, 16, 32)


def test_measures() -> None:
    expected = np.array([3.0, 4.0])
    row = measure("p", "t", expected, expected * 1.1, 0.05)
    assert row.relative_error == pytest.approx(0.1) and row.cosine == pytest.approx(1)
    assert not row and measure("p", "t", expected, expected, 0.0)
    assert not measure("p", "t", expected, np.array([np.nan, 4.0]), 1e9)
    assert measure("p", "t", expected * 0, expected, 1.0).as_dict()["relative_error"] == 1e30
    with pytest.raises(ValueError, match=r"p gives t of shape \[1\], expected \[2\]"):
        measure("p", "t", expected, expected[:1], 1.0)
    assert psnr(np.zeros(4), np.full(4, 0.1)) == pytest.approx(20)
    assert psnr(expected, expected) == 200


def test_polygraphy_pairs_outputs_by_name() -> None:
    feed = {"x": np.ones(3, np.float32)}
    rows = compare(
        "place", feed, {"y": feed["x"]}, lambda f: {"y": f["x"] * 2}, name="ort", limit=0.1
    )
    assert [row.relative_error for row in rows] == [1.0] and not rows[0]
    with pytest.raises(ValueError, match="place gives z on ort, expected y as in torch"):
        compare("place", feed, {"y": feed["x"]}, lambda f: {"z": f["x"]}, name="ort", limit=0.1)


def test_failures_are_sentences(result: dict[str, Any]) -> None:
    bad = copy.deepcopy(result)
    bad["trajectory"]["image_psnr"] = [60.0, 12.34]
    bad["experts"]["sure_agreement"], bad["experts"]["sites"][0]["sure_flips"] = 0.9, 3
    text = failures(bad)
    assert text[0].startswith("3 of ") and "an image has a PSNR of 12.3 dB" in text[1]
