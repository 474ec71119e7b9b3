"""Plans are really built, without a GPU: attention fused, no host in between, the same bytes."""

import json
import math
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from export.plans.build import bounds, build_plans, default_profiles, load_graph, tensors
from runtime.bundle.directory import open_bundle
from runtime.trt.launch_schedule import plan_key
from tests.tiny.graph import D, attention

rtx = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt
PROFILES = {"batch": [1, 1, 4], "image_tokens": [4, 16, 64], "text_tokens": [4, 8, 8]}
FLOAT, BFLOAT16 = TensorProto.FLOAT, TensorProto.BFLOAT16
WEIGHT_NAMES = ("w1", "b1", "w2", "b2")


def save(folder: Path, name: str, model: onnx.ModelProto) -> Path:
    path = folder / f"{name}.onnx"
    onnx.save(model, str(path))
    return path


# ---------------------------------------------------------------- build_plans


def test_build_plans_writes_plans_and_says_everything_a_runtime_needs(tmp_path):
    path = save(tmp_path, "attention", attention(TensorProto.BFLOAT16))
    seen = []
    plans = build_plans(
        {"transformer/double": path},
        tmp_path / "bundle",
        api="tensorrt_rtx",
        dtype="bfloat16",
        profiles=PROFILES,
        progress=lambda *args: seen.append(args),
    )
    (entry,) = plans.values()
    assert list(plans) == ["trt-rtx-portable"]
    assert entry["api"] == "tensorrt_rtx"
    assert entry["version"] == rtx.__version__
    assert entry["compute_capabilities"] == []
    assert entry["profiles"] == {name: PROFILES[name] for name in ("batch", "image_tokens")}
    assert entry["layers"]["transformer/double"]["fused_attention"] == 1
    relative = entry["files"]["transformer/double"]
    assert relative == "plans/trt-rtx-portable/transformer/double.plan"
    assert (tmp_path / "bundle" / relative).stat().st_size > 10_000
    io = entry["tensors"]["transformer/double"]
    assert io["inputs"][0]["shape"] == ["batch", "image_tokens", D]
    assert {row["dtype"] for row in io["inputs"]} == {"bfloat16"}
    assert io["outputs"][0]["name"] == "out_hidden_states"
    assert seen[0] == ("plans (tensorrt_rtx)", 0, 1) and seen[-1][1:] == (1, 1)
    json.dumps(plans, allow_nan=False)


def test_the_same_graph_gives_the_same_bytes(tmp_path):
    path = save(tmp_path, "attention", attention(TensorProto.FLOAT16))
    graphs = {f"transformer/{name}": path for name in "ab"}  # built side by side
    found = []
    for folder in ("one", "two"):
        kwargs = {"sm": (86, 120), "dtype": "float16", "profiles": PROFILES}
        plans = build_plans(graphs, tmp_path / folder, **kwargs)
        (entry,) = plans.values()
        assert list(plans) == ["trt-rtx-sm86-sm120"]
        found += [(tmp_path / folder / file).read_bytes() for file in entry["files"].values()]
    assert len(set(found)) == 1


def test_float32_keeps_its_attention_apart_and_is_not_asked_to_fuse_it(tmp_path):
    path = save(tmp_path, "attention", attention())
    (entry,) = build_plans(
        {"transformer/double": path}, tmp_path, dtype="float32", profiles=PROFILES
    ).values()
    assert entry["layers"]["transformer/double"]["fused_attention"] == 0


def test_a_missing_profile_and_a_missing_file_are_named(tmp_path):
    path = save(tmp_path, "attention", attention())
    with pytest.raises(ValueError, match="expected a profile for 'batch' besides image_tokens"):
        build_plans({"transformer/double": path}, tmp_path, profiles={"image_tokens": [1, 2, 3]})
    with pytest.raises(FileNotFoundError, match="nothing.onnx is not a file"):
        build_plans({"a/b": tmp_path / "nothing.onnx"}, tmp_path, profiles=PROFILES)


def test_bounds_follow_sums_multiples_and_a_components_own_profile():
    io = {
        "inputs": [
            {"name": "rope", "shape": ["tokens", 4]},
            {"name": "ids", "shape": ["batch", "text_tokens"]},
            {"name": "w", "shape": [4, 4]},
        ],
        "outputs": [{"name": "y", "shape": ["8*image_tokens", "2 * batch + 1"]}],
    }
    profiles = {**PROFILES, "clip.text_tokens": [7, 7, 7]}
    assert bounds(io, profiles, "t5/all") == {
        "rope": ((8, 4), (24, 4), (72, 4)),
        "ids": ((1, 4), (1, 8), (4, 8)),
    }
    assert bounds(io, profiles, "clip/all")["ids"] == ((1, 7), (1, 7), (4, 7))


def test_default_profiles_hold_the_default_picture():
    profiles = default_profiles(
        {
            "defaults": {"height": 1024, "width": 1024},
            "family": "flux",
            "latents": {"vae_scale_factor": 8, "patch": 2},
            "tokenizers": {"tokenizer": {"max_length": 77}, "tokenizer_2": {"max_length": 512}},
        }
    )
    assert profiles["image_tokens"] == [256, 4096, 9216]
    assert profiles["latent_height"] == [32, 128, 192]
    assert all(low <= opt <= high for low, opt, high in profiles.values())


def test_profiles_have_room_for_references():
    """One of Kontext's, of which the longest has 672 x 1568 pixels; four of FLUX.2's largest."""
    size = {"height": 1024, "width": 1024}
    latents = {"vae_scale_factor": 8, "patch": 2}
    tokenizers = {name: {"max_length": 512} for name in ("tokenizer", "tokenizer_2")}
    manifest = {"defaults": size, "family": "flux", "latents": latents, "tokenizers": tokenizers}
    kontext = default_profiles(manifest | {"latents": latents | {"condition": "reference"}})
    assert kontext["image_tokens"] == [256, 4096 + 42 * 98, 9216 + 42 * 98]
    assert kontext["latent_height"] == kontext["latent_width"] == [32, 128, 196]
    several = default_profiles(manifest | {"family": "flux2"})
    assert several["image_tokens"] == [256, 4096, 9216 + 4 * 4096]
    assert several["latent_width"] == [32, 128, 194]


def test_load_graph_is_the_graph_with_body_and_fused(tmp_path):
    path = save(tmp_path, "attention", attention())
    io = tensors(load_graph(path, tokens=16))
    assert {row["name"]: row["shape"] for row in io["inputs"]}["qkv.bias"] == [1, 3 * D]


# ---------------------------------------------------------------- a real bundle's blocks


def test_every_plan_of_a_bundle_is_built(tiny_bundle: Path, tmp_path: Path):
    """All block types of all components, with weights as inputs; in float32, as they lie there."""
    bundle = open_bundle(tiny_bundle)
    graphs = {
        plan_key(component, kind, key): bundle.file(path)
        for component, record in bundle.manifest["components"].items()
        for kind, row in record["types"].items()
        for key, path in row["graphs"].items()
        if key in ("", "0", "2")
    }
    profiles = default_profiles(bundle.manifest)
    (entry,) = build_plans(graphs, tmp_path, dtype="float32", profiles=profiles).values()
    assert set(entry["files"]) == {
        *("text_encoder/clip", "text_encoder_2/t5", "vae_decoder/vae", "vae_encoder/vae"),
        *("transformer/embed", "transformer/final"),
        *(f"transformer/{kind}.k{k}" for kind in ("double", "single") for k in (0, 2)),
    }
    assert not any(row["conditionals"] + row["host_copies"] for row in entry["layers"].values())
    for key, io in entry["tensors"].items():  # every weight fits the bytes that will be bound
        component, kind = key.split("/")[0], key.split("/")[1].split(".")[0]
        row = bundle.component(component)["types"][kind]
        for tensor in io["inputs"]:
            if tensor["name"] not in row["inputs"]:
                weight = row["weights"][tensor["name"]]
                assert math.prod(weight["shape"]) == math.prod(tensor["shape"])
                assert weight["dtype"] == tensor["dtype"]
        assert [t["name"] for t in io["outputs"]] == [f"out_{name}" for name in row["outputs"]]


@pytest.mark.parametrize("kind", ["double", pytest.param("single", marks=pytest.mark.slow)])
def test_a_blocks_plan_in_bfloat16_is_fused(tiny_sparse_dir: Path, tmp_path: Path, kind: str):
    """The plans that an fp32 bundle gets: attention one kernel, biases in the matmuls' kernels."""
    import torch

    from export.checkpoint.pipeline import empty_transformer
    from export.families.flux import ROWS, environment
    from export.graph.blocks import block_type

    model = empty_transformer(tiny_sparse_dir)
    group = {"double": "transformer_blocks", "single": "single_transformer_blocks"}[kind]
    block, inner = getattr(model, group)[0], environment(model, torch.bfloat16)[1]
    row = ROWS[type(block).__name__]
    read, written = ({name: inner[name] for name in side} for side in (row.inputs, row.outputs))
    traced = block_type(kind, block, row.call, read, written, torch.bfloat16, (2,))
    path, key = save(tmp_path, kind, traced.graphs["2"]), f"transformer/{kind}.k2"
    (entry,) = build_plans({key: path}, tmp_path, dtype="bfloat16", profiles=PROFILES).values()
    counts = entry["layers"][key]
    assert counts["fused_attention"] == 1
    assert counts["conditionals"] == counts["host_copies"] == 0
    gates = [row for row in entry["tensors"][key]["inputs"] if "gate" in row["name"]]
    assert gates and {row["dtype"] for row in gates} == {"float32"}


@pytest.mark.parametrize(("width", "fused"), [(64, 1), (320, 0)])
def test_a_vaes_attention_is_one_kernel_up_to_heads_of_256(tmp_path: Path, width: int, fused: int):
    """The VAEs of published models have one head of 384 or 512, which no release fuses."""
    import torch
    from diffusers import AutoencoderKL

    from export.families.encoders import vae_program
    from export.plans.fuse import WIDEST, attentions

    vae = AutoencoderKL(
        block_out_channels=(width,), layers_per_block=1, norm_num_groups=4, sample_size=32
    )
    (traced,) = vae_program(vae.eval(), torch.bfloat16).types.values()
    path, key = save(tmp_path, "vae", traced.graphs[""]), "vae_decoder/vae"
    profiles = {**PROFILES, "latent_height": [2, 8, 16], "latent_width": [2, 8, 16]}
    (entry,) = build_plans({key: path}, tmp_path, profiles=profiles).values()
    assert attentions(load_graph(path, tokens=16)) == (width <= WIDEST) == fused
    assert entry["layers"][key]["fused_attention"] == fused
