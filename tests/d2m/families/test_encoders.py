"""What stands beside the transformers: the real classes have the sizes that are foretold."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2m.families.encoders import EncoderSize
from d2m.plan.model_config import shipped_configs, subject_of
from d2m.plan.needs import (
    ALIVE,
    component_bytes,
    decoding,
    export_needs,
    largest_component_tensor,
    neuron_bytes,
    run_needs,
)

# read: the published configs
T5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24}
T5 |= {"num_heads": 64, "feed_forward_proj": "gated-gelu"}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_L |= {"num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
CLIP_G |= {"num_attention_heads": 20, "projection_dim": 1280}
QWEN = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
QWEN |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
QWEN3 = {"vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN3 |= {"num_key_value_heads": 8, "head_dim": 128}
QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
QWEN3_8B = {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
EYE = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
EYE |= {"out_hidden_size": 3584}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4}
VAE |= {"up_block_types": ("UpDecoderBlock2D",) * 4}


def t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(**T5))
    return model, model


def clip(projected: bool, config: dict[str, int]) -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**config))
    return model, model


def vae(channels: int, convolved: bool) -> tuple[Any, Any]:
    from diffusers import AutoencoderKL

    from export.families.encoders import Decoder

    quant = {"use_quant_conv": convolved, "use_post_quant_conv": convolved}
    model = AutoencoderKL(**VAE, latent_channels=channels, **quant)
    return model, Decoder(model)


def qwen() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(text_config=QWEN, vision_config=EYE, tie_word_embeddings=False)
    model = Qwen2_5_VLForConditionalGeneration(config)
    return model, model.model.language_model


def qwen_vae() -> tuple[Any, Any]:
    from diffusers import AutoencoderKLQwenImage

    from export.families.qwen_vae import Decoder

    model = AutoencoderKLQwenImage()
    count = sum(p.numel() for p in model.parameters())
    return count, Decoder(model)


def read_layers(language: Any, count: int) -> Any:
    """The embedding and the layers whose states, or those before, are read."""
    return torch.nn.ModuleList([language.embed_tokens, *language.layers[:count]])


def qwen3(config: dict[str, Any], layers: int = 27) -> tuple[Any, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**QWEN3, **config))
    model.tie_weights()
    return model, read_layers(model.model, layers)


def mistral3() -> tuple[Any, Any]:
    """transformers' defaults are the published model's."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    model = Mistral3ForConditionalGeneration(Mistral3Config(tie_word_embeddings=False))
    return model, read_layers(model.model.language_model, 30)


def flux2_vae() -> tuple[Any, Any]:
    from diffusers import AutoencoderKLFlux2

    from export.families.encoders import Decoder

    model = AutoencoderKLFlux2()
    return model, Decoder(model)


# By family, or where its models have several, by shipped config.
BUILT = {
    "flux": {"text_encoder": lambda: clip(False, CLIP_L), "text_encoder_2": t5},
    "sd3": {
        "text_encoder": lambda: clip(True, CLIP_L),
        "text_encoder_2": lambda: clip(True, CLIP_G),
    },
    "chroma": {"text_encoder": t5, "vae": lambda: vae(16, False)},
    "pixart": {"text_encoder": t5, "vae": lambda: vae(4, True)},
    "qwen": {"text_encoder": qwen, "vae": qwen_vae},
    "zimage": {"text_encoder": lambda: qwen3(QWEN3_4B, 35), "vae": lambda: vae(16, False)},
}
for config, text in (
    ("flux2-klein-4b", lambda: qwen3(QWEN3_4B)),
    ("flux2-klein-9b", lambda: qwen3(QWEN3_8B)),
    ("flux2-dev", mistral3),
):
    BUILT[config] = {"text_encoder": text, "vae": flux2_vae}
BUILT["flux"]["vae"] = BUILT["sd3"]["vae"] = lambda: vae(16, False)
BUILT["sd3"]["text_encoder_3"] = t5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", shipped_configs())
def test_sizes_are_those_of_the_real_classes(config: str) -> None:
    from export.families import FAMILIES as EXPORTED

    subject = subject_of(config)
    family = subject.family.names.name
    built = BUILT.get(config) or BUILT[family]
    assert subject.encoders.keys() == built.keys()
    for name, build in built.items():
        with torch.device("meta"):
            model, used = build()
        sizes = [p.numel() for p in used.parameters()]
        whole = model if isinstance(model, int) else sum(p.numel() for p in model.parameters())
        known = subject.encoders[name]
        assert (known.params, known.bundled, known.largest) == (whole, sum(sizes), max(sizes)), name
    models = [model for model in EXPORTED[family].components if model]
    whole = {model.folder: model.whole for model in models}
    assert {name: each.whole for name, each in subject.encoders.items()} == whole


class Alive(TorchDispatchMode):
    """Counts the numbers of all tensors that calls have made and nobody has dropped yet."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.sizes = {each.untyped_storage()._cdata: 0 for each in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = call(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes() // 4
                self.now += storage.nbytes() // 4
                weakref.finalize(storage, self.dropped, storage._cdata)
        self.most = max(self.most, self.now)
        return answer

    def dropped(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("config", ["flux-dev", "qwen-image"])
@pytest.mark.parametrize("size", [512, 1024])
def test_decoding_holds_three_of_its_widest_tensors(config: str, size: int) -> None:
    with torch.device("meta"):
        _, decoder = BUILT[subject_of(config).family.names.name]["vae"]()
        latents = torch.empty(1, 16, size // 8, size // 8)
    with torch.no_grad(), Alive([*decoder.parameters(), latents]) as alive:
        decoder(latents)
    assert decoding(config, size, size, ALIVE) == pytest.approx(alive.most, rel=0.03)


def test_decoding_counts_the_directorys_own_vae(tiny_dense_dir: Path, tmp_path: Path) -> None:
    """Its widths, its halvings, and its attention's scores where the picture is large."""
    shutil.copytree(tiny_dense_dir, tmp_path / "flux")
    file = tmp_path / "flux" / "vae" / "config.json"
    config = json.loads(file.read_text())
    for levels, attention, expected in (
        ([8, 16, 32], False, 3 * 16 * 64 * 64),
        ([8], False, 3 * 8 * 64 * 64),
        ([2, 2], True, 2 * (32 * 32) ** 2),
    ):
        config |= {"block_out_channels": levels, "mid_block_add_attention": attention}
        file.write_text(json.dumps(config))
        assert decoding(tmp_path / "flux", 64, 64, 3.0) == expected


@pytest.mark.parametrize("config", shipped_configs())
def test_forecasts_count_the_familys_own_components(config: str) -> None:
    beside = subject_of(config).encoders
    drawn = 2 * sum(each.bundled for each in beside.values())
    assert component_bytes(config) == 2 * sum(each.params for each in beside.values())
    assert component_bytes(config, bundled=True) == drawn
    assert largest_component_tensor(config) == 2 * max(each.largest for each in beside.values())
    run, export = run_needs(config, preset="L"), export_needs(config, preset="L")
    size = run.disk - drawn  # the transformer's
    assert run.vram is not None and run.vram > size + drawn and run.ram > 2 * drawn
    sparse_neurons = neuron_bytes(subject_of(config), True)
    assert size - sparse_neurons + drawn < export.disk < 1.01 * (size + drawn)
    assert export.ram < 4e9  # no encoder of gigabytes is held


def test_of_a_directory_its_files_count(tmp_path: Path) -> None:
    """Text encoders that export reads one by one are not held; an eye is in no bundle."""
    from safetensors.torch import save_file

    from tests.tiny.families import FAMILIES as TINY

    pipe = TINY["qwen"].build()
    pipe.save_pretrained(tmp_path / "qwen")
    root = tmp_path / "qwen"
    vae_size = sum(path.stat().st_size for path in (root / "vae").iterdir())
    assert component_bytes(root, held=True) == vae_size
    every = sum(
        p.stat().st_size for p in root.rglob("*") if p.is_file() and "transformer" not in p.parts
    )
    assert component_bytes(root, bundled=True) < component_bytes(root) == every
    (root / "text_encoder" / "more.safetensors").unlink(missing_ok=True)
    save_file({"wide": torch.zeros(300, 400)}, root / "text_encoder" / "more.safetensors")
    assert largest_component_tensor(root) == pytest.approx(4 * 300 * 400, rel=0.02)
    assert isinstance(subject_of(root).encoders["vae"], EncoderSize)
