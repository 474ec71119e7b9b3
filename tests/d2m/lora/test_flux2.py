"""LoRAs of FLUX.2 under the names of those who train them, against diffusers' own reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_non_diffusers_flux2_lora_to_diffusers,
)

from d2m.families.known import FLUX2
from d2m.lora.file import read_lora
from d2m.lora.parts import dense_linears
from tests.tiny.flux2 import flux2_transformer
from tests.tiny.lora import RANK, write

# read: Black Forest Labs' names; the layers that are several of diffusers' Linears are one here.
ENDS = (
    "img_in txt_in time_in.in_layer time_in.out_layer guidance_in.in_layer guidance_in.out_layer"
    " double_stream_modulation_img.lin double_stream_modulation_txt.lin"
    " single_stream_modulation.lin final_layer.linear"
).split()
DOUBLE = "img_attn.qkv img_attn.proj img_mlp.0 img_mlp.2 txt_attn.qkv txt_attn.proj".split()
DOUBLE += "txt_mlp.0 txt_mlp.2".split()
LAST = "final_layer.adaLN_modulation.1"
WIDTH, TEXT, CHANNELS = 32, 72, 16


def sizes(layer: str) -> tuple[int, int]:
    """(outputs, inputs) of a layer of the tiny [dev]."""
    end = layer.split(".", 2)[-1] if "blocks" in layer else layer
    hidden = 3 * WIDTH
    known = {
        "img_in": (WIDTH, CHANNELS), "txt_in": (WIDTH, TEXT), "final_layer.linear": (16, WIDTH),
        LAST: (2 * WIDTH, WIDTH), "single_stream_modulation.lin": (3 * WIDTH, WIDTH),
        "img_attn.qkv": (3 * WIDTH, WIDTH), "txt_attn.qkv": (3 * WIDTH, WIDTH),
        "img_mlp.0": (2 * hidden, WIDTH), "txt_mlp.0": (2 * hidden, WIDTH),
        "img_mlp.2": (WIDTH, hidden), "txt_mlp.2": (WIDTH, hidden),
        "linear1": (3 * WIDTH + 2 * hidden, WIDTH), "linear2": (WIDTH, WIDTH + hidden),
    }  # fmt: skip
    if end.startswith("double_stream"):
        return 6 * WIDTH, WIDTH
    return known.get(end, (WIDTH, 256 if end.endswith("in_layer") else WIDTH))


def layers() -> list[str]:
    doubles = [f"double_blocks.{i}.{layer}" for i in range(2) for layer in DOUBLE]
    return [*ENDS, *doubles, *(f"single_blocks.{i}.linear{n}" for i in range(3) for n in (1, 2))]


def factors(names: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name in names:
        outputs, inputs = sizes(name)
        up = torch.randn(outputs, RANK, generator=draw)
        found[name] = up, torch.randn(RANK, inputs, generator=draw)
    return found


def ai_toolkit(names: list[str]) -> dict[str, torch.Tensor]:
    """As ai-toolkit and ComfyUI write it."""
    rows = factors(names).items()
    found = {f"diffusion_model.{name}.lora_A.weight": down for name, (_, down) in rows}
    return found | {f"diffusion_model.{name}.lora_B.weight": up for name, (up, _) in rows}


def kohya(names: list[str]) -> dict[str, torch.Tensor]:
    """As kohya's sd-scripts write it: dots as underscores, alphas."""
    found = {}
    for name, (up, down) in factors(names).items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        found |= {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down}
        found[f"{flat}.alpha"] = torch.tensor(1.5)
    return found


@pytest.mark.parametrize(
    ("write_as", "convert", "alphas"),
    [
        (ai_toolkit, _convert_non_diffusers_flux2_lora_to_diffusers, False),
        (kohya, _convert_kohya_flux2_lora_to_diffusers, True),
    ],
)
def test_names_mean_what_diffusers_takes_them_for(
    write_as, convert, alphas, tmp_path: Path
) -> None:
    """Every Linear of [dev] but the last norm's, q, k and v apart."""
    model = flux2_transformer(guidance_embeds=True)
    names = layers()
    found = read_lora(
        write(tmp_path / "lora.safetensors", write_as(names)), dense_linears(model.config, FLUX2)
    )
    theirs = {
        key.removeprefix("transformer."): tensor
        for key, tensor in convert(dict(write_as(names))).items()
    }
    expected = {
        key.removesuffix(".lora_A.weight"): (theirs[key.replace(".lora_A.", ".lora_B.")] @ tensor)
        for key, tensor in theirs.items()
        if key.endswith(".lora_A.weight")
    }
    every = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(found) == every - {"norm_out.linear"}
    # Of kohya's, diffusers leaves out modulation and guidance.
    assert set(found) >= set(expected) and len(expected) >= len(found) - (5 if alphas else 0)
    for name, change in expected.items():
        own = found[name]
        torch.testing.assert_close(own.scale * own.up @ own.down, change)


def test_the_last_norm_is_turned_as_its_weights_are(tmp_path: Path) -> None:
    """Shift and scale there, scale and shift in diffusers, whose LoRA reader leaves them so."""
    model = flux2_transformer()
    file = write(tmp_path / "lora.safetensors", ai_toolkit([LAST]))
    (change,) = read_lora(file, dense_linears(model.config, FLUX2)).values()
    up, down = factors([LAST])[LAST]
    shift, scale = (up @ down).chunk(2)
    torch.testing.assert_close(change.up @ change.down, torch.cat([scale, shift]))
