"""Distilled [klein], dense, and [dev], sparse: from diffusers' pipeline to the runtime's images.

Sparse, [klein] base is among all families in test_families.py: what is of a negative prompt alone
is asked there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.measure.importance import magnitudes, scores_of
from d2m.families import family_of, family_of_pipeline
from d2m.families.flow import generator_at
from d2m.families.flux2 import LAYERS
from d2m.families.generation_defaults import generation_defaults, write_defaults
from d2m.model.sparse_transformer import sparse_model_of
from d2m.model.surgery import set_top_k, sparse_ffns
from d2m.recipe.recipe import from_dict
from tests.conftest import exported
from tests.tiny.flux2 import LENGTH, flux2_dev, klein
from tests.tiny.pipeline import IMAGE_SIZE

# Of different lengths, one too long for the tokenizer with its template.
PROMPTS = ["a red circle", "", " ".join(["two blue squares and a green ring"] * 4)]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=[klein, pytest.param(flux2_dev, marks=pytest.mark.slow)])
def build(request: pytest.FixtureRequest) -> Callable[[], Any]:
    found: Callable[[], Any] = request.param
    return found


@pytest.fixture(scope="module")
def dense(build: Callable[[], Any]) -> Any:
    built = build()
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="module")
def pipe(build: Callable[[], Any], dense: Any) -> Any:
    """[klein] as it is, [dev] with experts of which a token uses two."""
    if build is klein:
        return dense
    made = from_dict({"name": "t", "stages": [], "split": "magnitude"}, "test")
    scores = scores_of(dense.transformer, magnitudes)
    sparse = sparse_model_of(dense.transformer, scores, made, family_of_pipeline(dense))
    generator = torch.Generator().manual_seed(3)
    for ffn in sparse_ffns(sparse).values():
        torch.nn.init.normal_(ffn.gate.weight, generator=generator)
    set_top_k(sparse, 2)
    built = build()
    built.register_modules(transformer=sparse)
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="module")
def directory(build: Any, pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux2") / build.__name__
    pipe.save_pretrained(path)
    write_defaults(path, height=IMAGE_SIZE, width=IMAGE_SIZE)
    return path


def choices(build: Any) -> dict[str, Any]:
    return {} if build is klein else {"top_k": (2,)}


@pytest.fixture(scope="module")
def bundle(build: Any, directory: Path, pytestconfig: pytest.Config) -> Path:
    return exported(pytestconfig, directory, **choices(build))


def test_every_part_is_torchs(build: Any, bundle: Path, directory: Path) -> None:
    """Text encoder, every block, VAE, whole graph and trajectory in ONNX Runtime."""
    from export.parity.run import parity

    answer = parity(directory, bundle, prompts=PROMPTS, steps=2)
    assert answer["passed"], answer["failures"]
    rows = [*answer["components"], *answer["blocks"]]
    assert max(row["relative_error"] for row in rows) < 2e-5
    places = {row["place"] for row in rows}
    assert {"text_encoder", "transformer", "vae_decoder", "vae_encoder", "embed (step 0)"} <= places
    assert min(answer["trajectory"]["image_psnr"]) > 80


def test_an_image_is_encoded_as_by_the_pipeline(pipe: Any, bundle: Path) -> None:
    """Patched, normalised and packed."""
    from runtime.pipeline import Pipeline
    from runtime.sampling import encode_image

    image = np.random.default_rng(0).uniform(-1, 1, (2, 3, 12, 16)).astype(np.float32)
    with torch.no_grad():
        expected = pipe._pack_latents(pipe._encode_vae_image(torch.from_numpy(image), None))
    found = encode_image(Pipeline(bundle, "ort", threads=1), image)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_a_bundle_has_the_layers_that_are_read(pipe: Any, bundle: Path) -> None:
    """Traced once each, weights as inputs; what follows the last layer read is left out."""
    from runtime.bundle.directory import open_bundle

    opened = open_bundle(bundle)
    kinds = [call["type"] for call in opened.component("transformer")["program"]]
    assert kinds == ["embed", *["double"] * 2, *["single"] * 3, "final"]
    text = opened.component("text_encoder")
    layers = LAYERS[type(pipe.text_encoder).__name__]
    kinds = [call["type"] for call in text["program"]]
    assert kinds.count("layer") == layers[-1] and set(text["types"]) == {
        "embed", "layer", "keep_0", "keep_1", "keep_2", "states"
    }  # fmt: skip
    names = opened.weights("text_encoder").tensors
    assert any(f"layers.{layers[-1] - 1}." in name for name in names)
    assert not any(f"layers.{layers[-1]}." in name for name in names)
    assert not any(name.endswith((".norm.weight", "lm_head.weight")) for name in names)
    assert not any("vision" in name for name in names)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_draws_as_diffusers_does(pipe: Any, bundle: Path, guidance: float) -> None:
    """From the same latents: a batch of different prompts, not square."""
    import runtime
    from runtime.sampling import denoise, encode

    family, draw = family_of_pipeline(pipe), generator_at(0, "draw")
    size = {"height": 12, "width": 20}
    noise = torch.stack([family.data.noise(pipe, *size.values(), draw) for _ in PROMPTS])
    drawer = runtime.load(bundle, "ort", threads=1)
    assert drawer.manifest["guided"] is False and family.data.unconditional_of(pipe) == 0
    given: dict[str, Any] = {"prompt": PROMPTS, "latents": noise, "num_inference_steps": 3}
    given |= {"guidance_scale": guidance, "max_sequence_length": LENGTH, **size}
    ours = drawer(PROMPTS, latents=noise.numpy(), steps=3, guidance=guidance, **size)
    with torch.no_grad():
        theirs = family.data.generate(pipe, given | {"output_type": "np"}).images
        last = family.data.generate(pipe, given | {"output_type": "latent"}).images
    for mine, other in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(mine, np.float32) / 255 - other).max() < 0.51 / 255  # rounding
    found = denoise(
        drawer,
        noise.numpy(),
        encode(drawer, PROMPTS),
        latent_size=(6, 10),
        top_k=[None] * 3,
        guidance=guidance,
    )
    error = np.linalg.norm(found - last.numpy()) / np.linalg.norm(last.numpy())
    assert error < 1e-4
    assert np.abs(found[0] - found[1]).max() > 1e-2  # other prompts, other images


def test_guidance_is_of_the_variant(build: Any, bundle: Path) -> None:
    """[dev] reads it, distilled [klein] does not, and neither takes a negative prompt."""
    import runtime

    drawer = runtime.load(bundle, "ort", threads=1)

    def image(**options: Any) -> np.ndarray:
        return np.asarray(drawer("a red circle", steps=2, **options), np.float32)

    plain = image(guidance=3.0)
    by_guidance = np.abs(plain - image(guidance=6.0)).max()
    assert (by_guidance > 0) == (build is not klein)
    assert ("guidance" in drawer.bundle.component("transformer")["inputs"]) == (build is flux2_dev)
    with pytest.raises(ValueError, match="negative is 'a star', expected none: this bundle does"):
        image(negative="a star")


def test_defaults_are_those_of_the_variant(build: Any, directory: Path, bundle: Path) -> None:
    (directory / "defaults.json").rename(directory / "kept.json")
    found = generation_defaults(directory)
    (directory / "kept.json").rename(directory / "defaults.json")
    few = build is klein
    assert found == {
        "height": 256,  # 128 latents, and the tiny VAE halves once
        "width": 256,
        "num_inference_steps": 4 if few else 50,
        "guidance_scale": 1.0 if few else 4.0,
        "max_sequence_length": LENGTH,
    }
    defaults = json.loads((bundle / "manifest.json").read_text())["defaults"]
    assert (defaults["steps"], defaults["guidance"]) == (4 if few else 50, 1.0 if few else 4.0)
    title = family_of(directory).names.title_of(
        json.loads((directory / "transformer" / "config.json").read_text())
    )
    assert title == ("FLUX.2 [dev]" if build is flux2_dev else "FLUX.2 [klein]")


def test_latents_of_pictures_and_back(pipe: Any) -> None:
    """Encoded pictures are what the pipeline makes of its own images, normalised and packed."""
    from export.families.flux2 import spatial

    family = family_of_pipeline(pipe)
    pictures = torch.randint(0, 256, (2, 12, 16, 3), generator=generator_at(0, "p")).byte()
    with torch.no_grad():
        latents = family.data.encode_images(pipe, pictures)
        plain = pipe.vae.encode(pictures.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
        theirs = pipe._encode_vae_image(pictures.permute(0, 3, 1, 2) / 127.5 - 1, torch.Generator())
    torch.testing.assert_close(latents, pipe._pack_latents(theirs))
    torch.testing.assert_close(spatial(pipe, latents, 12, 16), plain, rtol=1e-5, atol=1e-5)
    ids = family.data.position_ids(
        pipe, {"latents": latents, "encoder_hidden_states": latents}, 12, 16
    )
    assert ids["img_ids"].shape == (12, 4) and ids["txt_ids"].shape == (12, 4)
    assert ids["img_ids"][-1].tolist() == [0, 2, 3, 0] and ids["txt_ids"][-1].tolist() == [
        0,
        0,
        0,
        11,
    ]


def test_a_text_encoder_by_blocks_and_by_plans(bundle: Path, tmp_path: Path) -> None:
    """Weights streamed layer by layer, and plans on their stand-in, give the same states."""
    from runtime.bundle.directory import open_bundle
    from runtime.ort.component import open_component
    from runtime.trt.component import Plans
    from tests.stand_ins.device import TARGET, HostContext, HostDevice, bundle_with_plans

    opened = open_bundle(bundle)
    ids = np.random.default_rng(0).integers(0, 40, (2, 16))
    mask = (np.arange(16) < [[9], [16]]).astype(np.int64)
    given = {"input_ids": ids, "attention_mask": mask}
    whole = open_component(opened, "text_encoder", threads=1)(given)["states"]
    streamed = open_component(opened, "text_encoder", threads=1, offload="block")(given)["states"]
    device = HostDevice()
    copied = bundle_with_plans(bundle, tmp_path / "bundle")
    plans = Plans(copied, "text_encoder", TARGET, device, lambda _, path: HostContext(path, device))
    for found in (streamed, plans(given)["states"]):
        np.testing.assert_allclose(found, whole, rtol=2e-4, atol=2e-5)
    assert np.abs(whole[:, 1:] - whole[:, :-1]).max() > 0.1


@pytest.mark.parametrize("top_k", [2, 12])
def test_sparse_with_guidance_and_groups_of_both_kinds(dense: Any, top_k: int) -> None:
    """float64: [dev]'s guidance reaches the student; all experts and blocks on are the teacher."""
    from d2m.families.inputs import noised, transformer_inputs
    from d2m.model.surgery import identity_error

    pipe, draw = dense, generator_at(0, "x")
    family, dense = family_of_pipeline(pipe), copy.deepcopy(pipe.transformer).double()
    facts = {"name": "t", "stages": [], "split": "magnitude", "top_k": top_k}
    facts["blocks"] = {"groups": {"double": [[0, 1]], "single": [[0, 1, 2]]}, "kappa": 1}
    scores = scores_of(dense, magnitudes)
    sparse = copy.deepcopy(sparse_model_of(dense, scores, from_dict(facts, "test"), family))
    with torch.no_grad():
        batch = family.data.encode_text(pipe, PROMPTS[:2], LENGTH)
        batch["latents"] = torch.stack([family.data.noise(pipe, 12, 20, draw) for _ in range(2)])
        batch = {name: each.double() for name, each in batch.items()}
        batch |= family.data.position_ids(pipe, batch, 12, 20)
        x, t, _ = noised(dense, batch, draw)
        inputs = transformer_inputs(dense, batch, x, t.double())
        assert identity_error(sparse, dense, inputs) < 1e-12
        few = sparse(**inputs, return_dict=False)[0]
        rows = ("img_ids", "txt_ids")
        for i in range(2):  # every sample chooses for itself
            own = {n: each if n in rows else each[i : i + 1] for n, each in inputs.items()}
            alone = sparse(**own, return_dict=False)[0]
            torch.testing.assert_close(few[i : i + 1], alone, rtol=1e-9, atol=1e-9)
        if "guidance" in inputs:
            other = sparse(**inputs | {"guidance": inputs["guidance"] + 2}, return_dict=False)[0]
            assert float((other - few).norm() / few.norm()) > 1e-3


@pytest.mark.tensorrt
@pytest.mark.slow
def test_plans_have_every_attention_fused(build: Any, directory: Path, tmp_path: Path) -> None:
    """bfloat16, from this machine without a GPU; no conditional, no copy to the host."""
    pytest.importorskip("tensorrt_rtx")
    from export.bundle import export_bundle
    from tests.families.test_families import graphs_of

    export_bundle(directory, tmp_path / "out", trt_rtx=True, **choices(build))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (target,) = manifest["plans"].values()
    assert target["dtype"] == "bfloat16" and set(target["files"]) == set(graphs_of(manifest))
    fused = {key.split(".")[0] for key, row in target["layers"].items() if row["fused_attention"]}
    assert fused >= {"transformer/double", "transformer/single", "text_encoder/layer"}
    rows = target["layers"].values()
    assert not any(row["conditionals"] or row["host_copies"] for row in rows)
