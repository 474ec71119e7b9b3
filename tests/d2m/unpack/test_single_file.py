"""Single files of a transformer become the pipeline's transformer, value for value."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from d2m.cli import main
from d2m.unpack.dense import unpacked_folder
from d2m.unpack.single_file import diffusers_names, match, take, unpack_single_file
from d2m.unpack.stored import Stored, open_stored
from runtime.lora.original_names import BFL_FLUX_1, BFL_FLUX_2, Z_IMAGE, OriginalNames

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def dense(tiny_dense_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_dense_dir / "transformer" / WEIGHTS)


def original(state: dict[str, torch.Tensor], names: OriginalNames) -> dict[str, torch.Tensor]:
    """A diffusers state dict under the makers' names; written here by hand, from the layers up."""
    found, used = {}, set()
    for layer, parts in names.layers.items():
        for i in [""] if "{i}" not in layer else map(str, range(100)):
            for ending in ("weight", "bias"):
                keys = [f"{part}.{ending}".replace("{i}", i) for part in parts]
                if not all(key in state for key in keys):
                    continue
                tensor = torch.cat([state[key] for key in keys])
                if layer in names.swapped:
                    scale, shift = tensor.chunk(2)
                    tensor = torch.cat([shift, scale])
                norm = "norm." in layer or ".norms." in layer
                own = "scale" if norm and names is not Z_IMAGE else ending
                found[f"{layer}.{own}".replace("{i}", i)] = tensor.contiguous()
                used |= set(keys)
    return found | {key: state[key] for key in state.keys() - used}


def test_flux_from_its_makers_names(
    tiny_dense_dir: Path, dense: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tensors = original(dense, BFL_FLUX_1)
    assert "double_blocks.0.img_attn.qkv.weight" in tensors
    assert "single_blocks.0.norm.query_norm.scale" in tensors
    assert not tensors.keys() & {key for key in dense if "blocks" in key}
    file = tmp_path / "flux.safetensors"
    others = {"vae.decoder.conv_in.weight": torch.ones(2), "text_encoders.t5xxl.x": torch.ones(2)}
    save_file({f"model.diffusion_model.{k}": v for k, v in tensors.items()} | others, file)
    out = unpack_single_file(file, tiny_dense_dir, tmp_path / "out", "base", log=print)
    made = load_file(out / "transformer" / WEIGHTS)
    assert made.keys() == dense.keys()
    assert all(torch.equal(made[key], dense[key]) for key in dense)
    assert (out / "text_encoder_2" / "config.json").is_file() and (out / "vae").is_symlink()
    before = (out / "transformer" / WEIGHTS).stat().st_mtime_ns
    unpack_single_file(file, tiny_dense_dir, tmp_path / "out", "base", log=print)  # as it is
    assert (out / "transformer" / WEIGHTS).stat().st_mtime_ns == before
    file.touch()
    with pytest.raises(ValueError, match="exists and is not of"):
        unpack_single_file(file, tiny_dense_dir, tmp_path / "out", "base", log=print)


def test_diffusers_own_names_stay(
    tiny_dense_dir: Path, dense: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(dense, tmp_path / "x.safetensors")
    out = unpack_single_file(tmp_path / "x.safetensors", tiny_dense_dir, tmp_path / "out", "base")
    made = load_file(out / "transformer" / WEIGHTS)
    assert all(torch.equal(made[key], dense[key]) for key in dense)


def tiny(name: str) -> dict[str, torch.Tensor]:
    """The state dict of a tiny model with random values."""
    import diffusers

    sizes: dict[str, dict[str, Any]] = {
        "Flux2Transformer2DModel": {
            "in_channels": 8, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4),
            "timestep_guidance_channels": 16,
        },
        "ZImageTransformer2DModel": {
            "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
            "n_kv_heads": 2, "cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [64, 64, 64],
        },
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**sizes[name])
    return {key: torch.randn_like(value.float()) for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "name, names, convert",
    [
        (
            "Flux2Transformer2DModel",
            BFL_FLUX_2,
            single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
        ),
        (
            "ZImageTransformer2DModel",
            Z_IMAGE,
            single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
        ),
    ],
)
def test_diffusers_own_conversion_gives_the_same(
    name: str, names: OriginalNames, convert: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    state = tiny(name)
    tensors = original(state, names)
    assert len(tensors.keys() - state.keys()) > 10
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    stored = {
        key: Stored(tuple(value.shape), value.dtype, "F32", lambda value=value: value)
        for key, value in tensors.items()
    }
    parts = match(stored, shapes, tmp_path, tmp_path)
    expected = convert(dict(tensors))
    assert parts.keys() == expected.keys() == state.keys()
    for key in state:
        found = take(stored, parts[key])
        assert torch.equal(found, expected[key]) and torch.equal(found, state[key]), key


def test_chroma_and_flux_at_their_real_size_are_mapped_as_diffusers_does() -> None:
    import diffusers

    for name, convert in (
        ("FluxTransformer2DModel", "convert_flux_transformer_checkpoint_to_diffusers"),
        ("ChromaTransformer2DModel", "convert_chroma_transformer_checkpoint_to_diffusers"),
    ):
        with torch.device("meta"):
            guidance = {"guidance_embeds": True} if name.startswith("Flux") else {}
            model = getattr(diffusers, name)(num_layers=1, num_single_layers=1, **guidance)
        state = model.state_dict()
        tensors = original(state, BFL_FLUX_1)
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        found = {each for key in tensors for each in diffusers_names(key, shapes)[0]}
        mapped = getattr(single_file_utils, convert)(dict(tensors))
        assert found == set(mapped) == set(state)
        assert {key: tuple(value.shape) for key, value in mapped.items()} == shapes


@pytest.mark.parametrize("scales", ["none", "scale_weight", "weight_scale"])
def test_float8_is_a_number_times_its_scale(
    tiny_dense_dir: Path, dense: dict[str, torch.Tensor], tmp_path: Path, scales: str
) -> None:
    tensors, expected = {}, {}
    for key, value in original(dense, BFL_FLUX_1).items():
        if not key.endswith(".weight") or value.ndim != 2:
            tensors[key] = value
            continue
        if scales == "none":
            scale = torch.tensor(1.0)
        elif scales == "scale_weight":
            scale = value.abs().max() / 448
        else:
            scale = value.abs().amax(1, keepdim=True) / 448
        tensors[key] = (value / scale).to(torch.float8_e4m3fn)
        expected[key] = (tensors[key].float() * scale).to(torch.bfloat16)
        if scales != "none":
            tensors[f"{key.removesuffix('.weight')}.{scales}"] = scale
            tensors[f"{key.removesuffix('.weight')}.scale_input"] = torch.tensor(1.0)
    tensors["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    with open_stored(file) as stored:
        assert expected and all(torch.equal(stored[key].read(), expected[key]) for key in expected)
    said: list[str] = []
    out = unpack_single_file(file, tiny_dense_dir, tmp_path / "out", "base", log=said.append)
    assert said == ["x.safetensors is quantised (F8_E4M3): its weights become bfloat16"]
    made = load_file(out / "transformer" / WEIGHTS)
    name = "single_transformer_blocks.0.proj_mlp.weight"
    error = (made[name].float() - dense[name]).norm() / dense[name].norm()
    assert made[name].dtype == torch.bfloat16 and error < 0.05


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_gguf_is_read_as_its_library_reads_it(
    kind: str, tiny_dense_dir: Path, dense: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    from gguf.quants import dequantize, quantize

    number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "flux")
    expected = {}
    for key, value in original(dense, BFL_FLUX_1).items():
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            data = quantize(value.numpy(), number)
            writer.add_tensor(key, data, raw_dtype=number)
            expected[key] = torch.from_numpy(dequantize(data, number).copy()).reshape(value.shape)
        else:
            writer.add_tensor(key, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = unpack_single_file(tmp_path / "x.gguf", tiny_dense_dir, tmp_path / "out", "base")
    made = load_file(out / "transformer" / WEIGHTS)
    assert made.keys() == dense.keys()
    assert torch.equal(made["norm_out.linear.bias"], dense["norm_out.linear.bias"])
    with open_stored(tmp_path / "x.gguf") as stored:
        for key, values in expected.items():
            assert torch.equal(stored[key].read(), values.to(stored[key].dtype))
    name = "transformer_blocks.0.ff.net.2.weight"
    error = (made[name].float() - dense[name]).norm() / dense[name].norm()
    assert error < {"Q4_0": 0.12, "Q8_0": 0.01}.get(kind, 0.005)


def test_convert_takes_a_single_file_and_removes_what_it_unpacked(
    tiny_dense_dir: Path, dense: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The same sparse model as of the pipeline that the file is of, and the base in its card."""
    file, whole = tmp_path / "flux1.safetensors", tmp_path / "whole"
    save_file(original(dense, BFL_FLUX_1), file)
    options = ["--init-only", "--importance", "magnitude", "--no-report"]
    assert main(["convert", str(tiny_dense_dir), "-o", str(whole), *options]) == 0
    out = tmp_path / "single"
    base = ["--base", str(tiny_dense_dir)]
    assert main(["convert", str(file), *base, "-o", str(out), *options]) == 0
    assert not unpacked_folder(out).exists()
    for path in sorted((whole / "transformer").glob("*.safetensors")):
        first, second = load_file(path), load_file(out / "transformer" / path.name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert str(tiny_dense_dir) in (out / "README.md").read_text()
    assert not (out / "text_encoder").is_symlink()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    return str(last)


def test_refusals(
    tiny_dense_dir: Path,
    dense: dict[str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = tmp_path / "x.safetensors", tmp_path / "out"
    tensors = original(dense, BFL_FLUX_1)
    save_file(tensors, file)
    assert "--base PIPELINE" in refused(capsys, file, "-o", out)
    assert "no file" in refused(capsys, tmp_path / "y.gguf", "--base", tiny_dense_dir, "-o", out)
    assert "--base is for a single file" in refused(
        capsys, tiny_dense_dir, "--base", tiny_dense_dir, "-o", out
    )
    lost = "double_blocks.0.img_attn.qkv.weight"
    for changed, sentence in (
        ({k: v for k, v in tensors.items() if k != lost}, "lacks transformer_blocks.0.attn.to_q"),
        (tensors | {"double_blocks.0.extra.weight": torch.ones(2)}, "extra.weight, which the"),
        (tensors | {lost: tensors[lost][:-1].clone()}, f"{lost} is [95, 32], but"),
        (tensors | {lost: tensors[lost].to(torch.uint8)}, "as U8, expected numbers of 8 bits"),
        ({"vae.x": torch.ones(1)}, "holds no transformer"),
        (tensors | {"img_in.scale_weight": torch.ones(1)}, "expected float8"),
    ):
        save_file(changed, file)
        assert sentence in refused(capsys, file, "--base", tiny_dense_dir, "-o", out)
    file.write_bytes(b"GGUF")
    shutil.copy(file, tmp_path / "x.gguf")
    for path in (file, tmp_path / "x.gguf"):
        assert "copy it again" in refused(capsys, path, "--base", tiny_dense_dir, "-o", out)
    pickled = tmp_path / "x.ckpt"
    pickled.write_bytes(b"PK")
    assert "nothing is unpickled" in refused(capsys, pickled, "-o", out)
    assert not out.exists() and not unpacked_folder(out).exists()
