"""LoRA files: both ways of naming give the same changes, alpha counts, anything else is refused."""

import json

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

from d2m.lora.file import LowRank, read_lora
from runtime.lora.names import layers_of, split_key
from tests.tiny.lora import RANK, factors, kohya, peft, write
from tests.tiny.pipeline import tiny_transformer


@pytest.fixture(scope="module")
def dense():
    return tiny_transformer()


@pytest.fixture(scope="module")
def shapes(dense):
    return shapes_of(dense)


def shapes_of(model):
    modules = model.named_modules()
    return {n: tuple(m.weight.shape) for n, m in modules if isinstance(m, torch.nn.Linear)}


def change(low):
    return low.part(None, None, torch.float64)


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("transformer.", "transformer."),
        ("transformer.", "base_model.model."),
        ("transformer.", "base_model.model.transformer."),
        ("transformer.", "diffusion_model."),
        (".lora_A.weight", ".lora_A.default.weight"),
        (".lora_A.weight", ".lora.down.weight"),
        ("transformer.", ""),
    ],
)
def test_names_of_diffusers_and_peft(dense, shapes, tmp_path, alpha, old, new):
    found = factors(dense)
    tensors = {key.replace(old, new, 1): tensor for key, tensor in peft(found, alpha).items()}
    file = write(tmp_path / "lora.safetensors", tensors)
    if new.startswith("base_model.model.") and alpha is None:  # of peft, which has it elsewhere
        with pytest.raises(ValueError, match="adapter_config.json, which is not there"):
            read_lora(file, shapes)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": RANK}))
    read = read_lora(file, shapes)
    assert read.keys() == found.keys() == shapes.keys()
    scale = 1.0 if alpha is None else alpha / RANK
    for name, (up, down) in found.items():
        assert torch.allclose(change(read[name]), scale * (up.double() @ down.double()))


@pytest.mark.parametrize("style", ["lora_unet_", "lora_transformer_"])
def test_kohya_style_of_diffusers_names(dense, shapes, tmp_path, style):
    found = factors(dense)
    tensors = {}
    for name, (up, down) in found.items():
        flat = style + name.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
    read = read_lora(write(tmp_path / "lora.safetensors", tensors), shapes)
    assert read.keys() == shapes.keys()


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_kohya_names_mean_what_diffusers_takes_them_for(alpha, tmp_path):
    """diffusers' own conversion is the oracle; it wants FLUX.1's width for single blocks.

    It spreads alpha over both factors, so products are compared; its own faults are that it drops
    the final layer's alpha and, where there is any, the word "transformer." of what is no block.
    """
    config = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 1}
    config |= {"num_single_layers": 1, "axes_dims_rope": (16, 56, 56)}
    with torch.device("meta"):
        from diffusers import FluxTransformer2DModel

        large = FluxTransformer2DModel(
            **config, in_channels=16, joint_attention_dim=32, pooled_projection_dim=32,
            guidance_embeds=True,
        )  # fmt: skip
    tensors = kohya(large, alpha=alpha)
    converted = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    expected = {key.removeprefix("transformer."): tensor for key, tensor in converted.items()}
    read = read_lora(write(tmp_path / "lora.safetensors", tensors), shapes_of(large))
    names = {key.rsplit(".lora_", 1)[0] for key in expected}
    assert names == set(read) == set(shapes_of(large))
    for name in names:
        low = read[name]
        down, up = (expected[f"{name}.lora_{factor}.weight"] for factor in "AB")
        if alpha is None:
            assert torch.equal(low.down, down) and torch.equal(low.up, up), name
        probe = torch.randn(down.shape[1], generator=torch.Generator().manual_seed(3))
        scale = 1.0 if name in ("norm_out.linear", "proj_out") else low.scale
        product = scale * (low.up @ (low.down @ probe))
        assert torch.allclose(product, up @ (down @ probe), rtol=1e-4, atol=1e-4), name


def test_alpha_of_kohya_and_bfls_dotted_names(dense, shapes, tmp_path):
    tensors = kohya(dense, alpha=1.5)
    read = read_lora(write(tmp_path / "a.safetensors", tensors), shapes)
    assert {low.scale for low in read.values()} == {0.5}
    up = tensors["lora_unet_double_blocks_0_txt_attn_qkv.lora_up.weight"]
    assert torch.equal(read["transformer_blocks.0.attn.add_k_proj"].up, up[32:64])
    half = tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(read["norm_out.linear"].up, torch.cat([half[32:], half[:32]]))
    names = ("double_blocks.1.img_attn.qkv", "double_blocks.1.txt_mlp.2", "single_blocks.0.linear1")
    for name in names:
        assert layers_of(f"transformer.{name}", shapes) == layers_of(
            "lora_unet_" + name.replace(".", "_"), shapes
        )


def test_scales_from_diffusers_metadata(dense, shapes, tmp_path):
    told = {"transformer.r": 3, "transformer.lora_alpha": 6,
            "transformer.alpha_pattern": {"transformer_blocks.0.attn.to_q": 12}}  # fmt: skip
    tensors = peft(factors(dense))
    metadata = {"lora_adapter_metadata": json.dumps(told)}
    read = read_lora(write(tmp_path / "a.safetensors", tensors, metadata), shapes)
    assert read["transformer_blocks.1.attn.to_q"].scale == 2
    assert read["transformer_blocks.0.attn.to_q"].scale == 4
    metadata = {"lora_adapter_metadata": json.dumps(told | {"transformer.use_rslora": True})}
    read = read_lora(write(tmp_path / "b.safetensors", tensors, metadata), shapes)
    assert read["proj_out"].scale == pytest.approx(6 / 3**0.5)
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
    with pytest.raises(ValueError, match="made with use_dora"):
        read_lora(write(tmp_path / "c.safetensors", tensors, metadata), shapes)


def test_parts_and_norms():
    generator = torch.Generator().manual_seed(0)
    low = LowRank(torch.randn(7, 2, generator=generator), torch.randn(2, 5, generator=generator), 3)
    whole = 3 * low.up.double() @ low.down.double()
    rows, columns = torch.tensor([4, 0, 6]), torch.tensor([1, 2])
    assert torch.allclose(low.part(rows, columns, torch.float64), whole[rows][:, columns])
    expected = float(whole[rows][:, columns].square().sum())
    assert low.squared_norm(rows, columns) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"transformer.proj_out.dora_scale": [3]},
            "'transformer.proj_out.dora_scale' is of a DoRA",
        ),
        ({"lora_unet_img_in.lokr_w1": [3, 3]}, "'lora_unet_img_in': it holds only lokr_w1"),
        ({"lora_unet_img_in.bias": [3]}, "other kinds of adapter"),
        ({"transformer.proj_out.lora_B.bias": [16]}, "lora_B.bias' is not understood"),
        ({"transformer.nothing.lora_A.weight": [3, 32]}, "'transformer.nothing' is none of this"),
        ({"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": [3, 32]}, "another model"),
        ({"lora_unet_double_blocks_0_img_attn_k.lora_up.weight": [32, 3]}, "is none of this"),
        ({"lora_unet_double_blocks_9_img_mlp_0.lora_up.weight": [32, 3]}, "is none of this"),
        ({"lora_te1_text_model_encoder.lora_up.weight": [32, 3]}, "belongs to a text encoder"),
        ({"text_encoder.layers.0.lora_A.weight": [3, 32]}, "belongs to a text encoder"),
        ({"proj_out.lora_A.weight": [3, 32]}, "the layer 'proj_out': it holds only down"),
        ({"transformer.proj_out.lora_A.weight": [3, 31]}, r"expected \[16, R\] and \[R, 32\]"),
        ({"transformer.proj_out.lora_A.weight": [4, 32]}, r"shape \[16, 3\] and \[4, 32\]"),
    ],
)
def test_what_is_not_understood_is_refused(dense, shapes, tmp_path, changes, words):
    tensors = peft(factors(dense)) | {name: torch.ones(shape) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=words) as caught:
        read_lora(write(tmp_path / "lora.safetensors", tensors), shapes)
    assert str(caught.value).startswith(str(tmp_path))


def test_the_same_layer_twice(dense, shapes, tmp_path):
    tensors = peft(factors(dense)) | kohya(dense)
    with pytest.raises(ValueError, match="twice, under two names"):
        read_lora(write(tmp_path / "lora.safetensors", tensors), shapes)


def test_no_loras(shapes, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file"):
        read_lora(tmp_path / "x.safetensors", shapes)
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="nothing is unpickled"):
        read_lora(tmp_path / "x.safetensors", shapes)
    with pytest.raises(ValueError, match="holds no LoRA"):
        read_lora(write(tmp_path / "y.safetensors", {}), shapes)
    assert split_key("a.b.lora_A.weight") == ("a.b", "down")
