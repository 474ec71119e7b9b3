"""Chroma in d2m: its weights by name, its masks, names of LoRAs; test_families has the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2m.families.chroma import MASK, STATES
from d2m.families.chroma.weights import weights
from d2m.families.flow import generator_at
from d2m.families.inputs import generate_latents
from d2m.families.known import CHROMA
from d2m.families.weights import Structure
from d2m.lora.file import read_lora
from d2m.lora.parts import dense_linears
from d2m.model.sparse_transformer import sparse_class
from d2m.plan.count import plan
from d2m.plan.model_config import sizes, subject_of
from d2m.recipe.recipe import SparseSpec
from tests.cases import flops
from tests.tiny.chroma import CHROMA_CONFIG, chroma, chroma_transformer
from tests.tiny.lora import kohya, write
from tests.tiny.pipeline import MAX_SEQUENCE_LENGTH

PROMPTS = ["a red circle", "two blue squares and a green ring"]
pytestmark = pytest.mark.filterwarnings("ignore")
flops.register()


@pytest.fixture(scope="module")
def pipe() -> Any:
    built = chroma()
    built.set_progress_bar_config(disable=True)
    return built


@pytest.mark.parametrize("top_k", [None, 0, 2])
def test_every_weight_and_flop(top_k: int | None) -> None:
    """Names and sizes against the class on the meta device, FLOPs against FlopCounterMode."""
    structure = Structure(None if top_k is None else SparseSpec(top_k=top_k))
    more = {} if top_k is None else {"top_k": top_k}
    cls = ChromaTransformer2DModel if top_k is None else sparse_class(CHROMA)
    for config in (CHROMA_CONFIG, dict(subject_of("chroma").config)):
        with torch.device("meta"):
            model = cls(**config, **more)
        real = {name: parameter.numel() for name, parameter in model.named_parameters()}
        read = sizes({"_class_name": "ChromaTransformer2DModel", **config}, "test")
        found: dict[str, int] = {}
        for stack in weights(read, structure, 16, 8):
            for weight in stack.weights:
                for i in range(stack.count) if weight.size else ():
                    name = stack.prefix.replace("*", str(i)) + weight.name
                    found[name] = found.get(name, 0) + weight.size
        assert found == real
    if top_k is None:
        total = sum(real.values())
        assert plan("chroma")["total_params"] == total
        assert total == pytest.approx(8.9e9, rel=1e-3)  # as published
    model = chroma_transformer() if top_k is None else cls(**CHROMA_CONFIG, **more)
    inputs = {"hidden_states": torch.ones(1, 16, 16), "timestep": torch.ones(1)}
    inputs |= {STATES: torch.ones(1, 8, 32), "img_ids": torch.zeros(16, 3)}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, txt_ids=torch.zeros(8, 3))
    read = sizes({"_class_name": "ChromaTransformer2DModel", **CHROMA_CONFIG}, "test")
    stacks = weights(read, structure, 16, 8)
    counted = sum(stack.active * weight.flops for stack in stacks for weight in stack.weights)
    assert counted == counter.get_total_flops()


def test_one_token_of_padding_is_read_and_no_other(pipe: Any) -> None:
    """The pipeline's own mask, as true and false: what it leaves out changes nothing at all."""
    data = CHROMA.data
    text = data.encode_text(pipe, PROMPTS, MAX_SEQUENCE_LENGTH)
    ids = pipe.tokenizer(PROMPTS).input_ids
    assert text[MASK].sum(1).tolist() == [len(tokens) + 1 for tokens in ids]
    assert text[MASK].dtype == torch.bool and not text[MASK].all(1).any()
    noise = torch.stack([data.noise(pipe, 12, 20, generator_at(0, "x")) for _ in PROMPTS])
    size: dict[str, Any] = {"height": 12, "width": 20, "num_inference_steps": 2}

    def last(states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        against = None if scale == 1 else text | {STATES: text[STATES].flip(0)}
        given = text | {STATES: states}
        return generate_latents(pipe, noise, given, against, guidance_scale=scale, **size)

    own = last(text[STATES])
    padding = text[MASK].logical_not()[..., None]
    assert torch.equal(own, last(text[STATES].masked_fill(padding, 50.0)))
    first = text[MASK].sum(1) - 1  # the one token of padding
    moved = text[STATES].clone()
    moved[range(len(first)), first] += 1
    assert float((own - last(moved)).norm()) > 1e-3
    # A prompt is encoded with the same masks, and so is what it is guided against.
    called = {"prompt": PROMPTS, "output_type": "latent", "guidance_scale": 1.0, "latents": noise}
    called |= {"max_sequence_length": MAX_SEQUENCE_LENGTH, **size}
    assert torch.equal(data.generate(pipe, dict(called)).images, own)
    guided = data.generate(pipe, called | {"guidance_scale": 3.0, "negative_prompt": "a star"})
    empty = data.generate(pipe, called | {"guidance_scale": 3.0})
    assert float((guided.images - empty.images).norm()) > 1e-3


def test_names_of_kohyas_lora_mean_what_diffusers_takes_them_for(tmp_path: Path) -> None:
    """FLUX.1's names, without modulation. diffusers reads none of the approximator's, a single
    block's first layer of width 3072 alone, and no alpha of the last layer."""
    model = chroma_transformer()
    tensors = kohya(model, alpha=1.5)
    found = read_lora(
        write(tmp_path / "a.safetensors", tensors), dense_linears(model.config, CHROMA)
    )
    every = {name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    approximator = {name for name in every if name.startswith("distilled")}
    assert every - set(found) < approximator and len(approximator & set(found)) == 3
    read = lambda key: "distilled" not in key and "linear1" not in key  # noqa: E731
    known = {key: value for key, value in tensors.items() if read(key)}
    theirs = _convert_kohya_flux_lora_to_diffusers(known)
    downs = {key: value for key, value in theirs.items() if key.endswith("lora_A.weight")}
    names = {key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in downs}
    first = {n for n in every if n.startswith("single") and not n.endswith("proj_out")}
    assert names == every - approximator - first and first < set(found)
    for key, down in downs.items():
        name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        own, change = found[name], theirs[key.replace("lora_A", "lora_B")] @ down
        scale = 1.0 if name == "proj_out" else own.scale
        torch.testing.assert_close(scale * own.up @ own.down, change)
