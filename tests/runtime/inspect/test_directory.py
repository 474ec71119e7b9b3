"""What inspect says, against torch's own count, and its refusals."""

import json
import shutil
from pathlib import Path

import pytest

from runtime.inspect.directory import inspect, summary_lines
from runtime.program.backends import BACKENDS


def test_a_sparse_checkpoint(tiny_sparse_dir: Path) -> None:
    import torch
    from diffusers import DiffusionPipeline

    import d2m  # noqa: F401

    info = inspect(tiny_sparse_dir)
    pipe = DiffusionPipeline.from_pretrained(tiny_sparse_dir, local_files_only=True)
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        total = sum(p.numel() for p in getattr(pipe, name).parameters())
        assert info["parameters"][name]["total"] == total, name
    routed = sum(
        p.numel()
        for name, p in pipe.transformer.named_parameters()
        if ".experts." in name and isinstance(p, torch.Tensor)
    )
    row = info["parameters"]["transformer"]
    assert row["total"] - row["activated"] == routed * 10 // 12
    assert info["what"] == "sparse checkpoint"
    assert info["blocks"] == {"double": 2, "single": 2}
    assert info["experts"] == {
        "num_experts": 12,
        "top_k": 2,
        "layers": 6,
        "width": 32,
        "expert_hidden": 8,
        "shared_hidden": 32,
    }
    assert "transformer/config.json" in info["files"]
    assert json.loads(json.dumps(info)) == info
    text = "\n".join(summary_lines(info))
    assert "2 double + 2 single" in text and f"{row['activated']:,} activated" in text


def test_a_dense_pipeline(tiny_dense_dir: Path) -> None:
    info = inspect(tiny_dense_dir)
    assert info["what"] == "dense pipeline" and info["experts"] is None
    row = info["parameters"]["transformer"]
    assert row["total"] == row["activated"] > 0
    assert summary_lines(info)


def test_sharded_weights(tiny_dense_dir: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    path = Path(shutil.copytree(tiny_dense_dir, tmp_path / "dense"))
    expected = inspect(path)["parameters"]
    model = FluxTransformer2DModel.from_pretrained(path / "transformer")
    shutil.rmtree(path / "transformer")
    model.save_pretrained(path / "transformer", max_shard_size="100KB")
    assert len(list((path / "transformer").glob("*.safetensors"))) > 1
    assert inspect(path)["parameters"] == expected


def test_a_bundle(tiny_bundle: Path, tiny_sparse_dir: Path) -> None:
    info, source = inspect(tiny_bundle), inspect(tiny_sparse_dir)
    assert info["what"] == "sparse bundle"
    assert info["blocks"]["double"] == info["blocks"]["single"] == 2
    assert info["experts"] == {
        "num_experts": 12,
        "top_k": 2,
        "top_k_choices": [0, 1, 2, 4],
        "onnx_body": "either",
    }
    assert info["parameters"]["transformer"] == source["parameters"]["transformer"]
    assert info["backend_here"]["name"] in ("ort", "ort-cuda", "trt-rtx", "trt")
    assert info["backends"].keys() == BACKENDS.keys()
    assert info["backends"]["ort"]["lacks"] is None
    assert info["backends"]["trt-rtx"]["lacks"] == "the bundle has no plans for it"
    assert "either (every expert on few tokens" in info["backends"]["ort"]["experts"]
    assert info["bytes"] == sum(info["files"].values())
    assert json.loads(json.dumps(info)) == info
    text = "\n".join(summary_lines(info))
    assert "sparse bundle" in text and "transformer.onnx" in text
    assert "images in: image, mask\n" in text
    assert "backend ort: run on x86 CPUs" in text and "backend ort-cuda: run on no GPU" in text
    assert "experts: body either" in text and "bench_bodies.json" in text


def test_plans_and_the_machine_they_need(tiny_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    value = json.loads((path / "manifest.json").read_text())
    row = {"api": "tensorrt_rtx", "version": "1.7.1.116", "dtype": "bfloat16"}
    files = {"files": {"transformer/double.k2": "transformer.onnx"}}
    value["plans"] = {
        "trt-rtx-portable": {**row, **files, "compute_capabilities": []},
        "trt-rtx-sm86-sm120": {**row, **files, "compute_capabilities": [86, 120]},
    }
    (path / "manifest.json").write_text(json.dumps(value))
    portable, named = inspect(path)["plans"]
    assert portable["needs"].startswith(
        "an NVIDIA GPU of compute capability 8.0, 8.6, 8.9, or 12.0"
    )
    assert named["needs"].endswith("8.6 or 12.0, and TensorRT-RTX 1.7.1.116, exactly")
    text = "\n".join(summary_lines(inspect(path)))
    assert "plans trt-rtx-sm86-sm120: 1 plans" in text


def test_refusals(tiny_dense_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no directory, expected a pipeline"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json and no model_index\.json"):
        inspect(tmp_path)
    path = Path(shutil.copytree(tiny_dense_dir, tmp_path / "dense"))
    (path / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"12345678901")
    with pytest.raises(ValueError, match="not valid safetensors"):
        inspect(path)
    (path / "model_index.json").write_text("[")
    with pytest.raises(ValueError, match=r"model_index\.json is not valid JSON"):
        inspect(path)
    (path / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors files"):
        inspect(path)
