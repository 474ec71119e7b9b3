"""FLUX.2 [klein] KV, dense and sparse: references' keys and values computed once, as diffusers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calib.measure.importance import magnitudes, scores_of
from d2m.families import family_of_pipeline
from d2m.families.flow import generator_at
from d2m.families.generation_defaults import write_defaults
from d2m.model.sparse_transformer import sparse_model_of
from d2m.model.surgery import set_top_k, sparse_ffns
from d2m.recipe.recipe import from_dict
from tests.conftest import exported
from tests.tiny.flux2 import LENGTH, klein_kv
from tests.tiny.pipeline import IMAGE_SIZE

PROMPTS = ["a red circle", "two blue squares and a green ring"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=[pytest.param("dense", marks=pytest.mark.slow), "sparse"])
def pipe(request: pytest.FixtureRequest) -> Any:
    built = klein_kv()
    if request.param == "sparse":
        made = from_dict({"name": "t", "stages": [], "split": "magnitude"}, "test")
        dense, family = built.transformer, family_of_pipeline(built)
        sparse = sparse_model_of(dense, scores_of(dense, magnitudes), made, family)
        generator = torch.Generator().manual_seed(3)
        for ffn in sparse_ffns(sparse).values():
            torch.nn.init.normal_(ffn.gate.weight, generator=generator)
        set_top_k(sparse, 2)
        built.register_modules(transformer=sparse)
        built._set_kv_attn_processors()
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="module")
def directory(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = "sparse" if sparse_ffns(pipe.transformer) else "dense"
    path = tmp_path_factory.mktemp("kv") / f"klein-kv-{kind}"
    pipe.save_pretrained(path)
    write_defaults(path, height=IMAGE_SIZE, width=IMAGE_SIZE)
    return path


@pytest.fixture(scope="module")
def bundle(pipe: Any, directory: Path, pytestconfig: pytest.Config) -> Path:
    sparse = {"top_k": (2,)} if sparse_ffns(pipe.transformer) else {}
    return exported(pytestconfig, directory, **sparse)


@pytest.mark.parametrize("mode", ["graph", "blocks"])
def test_sees_references_as_diffusers_does(pipe: Any, bundle: Path, mode: str) -> None:
    """Two references, two prompts, three steps, of which one alone computes the references."""
    from runtime.pipeline import Pipeline

    model, rng = Pipeline(bundle, "ort", threads=1, mode=mode), np.random.default_rng(0)
    sizes = [(66, 73), (80, 64)]  # diffusers takes none with a side below 64
    seen = [Image.fromarray(rng.integers(0, 256, (*each, 3), np.uint8)) for each in sizes]
    data, height, width = family_of_pipeline(pipe).data, 12, 20
    noise = torch.stack(
        [data.noise(pipe, height, width, generator_at(0, "noise", i)) for i in range(2)]
    )
    lengths, found = [], []
    model.step_hook = lambda inputs, top_k, kappa: lengths.append(
        (inputs["hidden_states"].shape[1], inputs["references"].shape[2])
    )
    options: dict[str, Any] = {"height": height, "width": width}
    asked = options | {"latents": noise.numpy(), "steps": 3}
    model(PROMPTS, references=seen, callback=lambda done, n, x: found.append(x), **asked)
    assert lengths == [(15, 16 * 18 + 20 * 16)] * 3
    with torch.no_grad():
        options |= {"prompt": PROMPTS, "image": seen, "latents": noise, "num_inference_steps": 3}
        options |= {"max_sequence_length": LENGTH, "output_type": "latent"}
        expected = data.generate(pipe, options).images.numpy()
    assert np.abs(found[-1] - expected).max() < 1e-4
    model(PROMPTS, callback=lambda done, n, x: found.append(x), **asked)
    assert lengths[-1] == (15, 0) and np.abs(found[-1] - expected).max() > 1e-2


def test_every_part_without_references_is_torchs(bundle: Path, directory: Path) -> None:
    from export.parity.run import parity

    answer = parity(directory, bundle, steps=2)
    assert answer["passed"], answer["failures"]
    assert answer["trajectory"]["steps"][-1]["relative_error"] < 1e-4


@pytest.mark.tensorrt
def test_quantised_references_are_near_and_plans_are_refused(
    pipe: Any, bundle: Path, directory: Path, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    """Both programs read the same quantised weights."""
    pytest.importorskip("tensorrt_rtx")
    from export.bundle import export_bundle
    from runtime.pipeline import Pipeline

    if sparse_ffns(pipe.transformer):
        pytest.skip("as dense")
    seen = [Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))]
    quantised = exported(pytestconfig, directory, quant="int8")
    images = [
        Pipeline(path, "ort", threads=1, mode="blocks")(
            PROMPTS[0], references=seen, steps=2, height=16, width=16, output_type="np"
        )
        for path in (bundle, quantised)
    ]
    assert 0 < np.abs(images[0] - images[1]).mean() < 0.02
    with pytest.raises(ValueError, match="keeps keys and values .* expected no plans"):
        export_bundle(directory, tmp_path / "out", trt_rtx=True)
