"""Images: graph and blocks, torch and runtime, now and again."""

import inspect
import logging
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL.Image import Image

import runtime
from runtime.families.latents import packed_noise, unpack
from runtime.image import save, settings_of
from runtime.pipeline import Pipeline
from runtime.sampling import Cancelled

PROMPTS = ["a red circle", "two blue squares above a green cross"]


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline(tiny_bundle, "ort", threads=1)


@pytest.fixture(scope="module")
def blocks(tiny_bundle: Path) -> Pipeline:
    return Pipeline(tiny_bundle, "ort", threads=1, mode="blocks")


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(np.float64)


def psnr(first: Any, second: Any) -> float:
    error = np.mean((pixels(first) - pixels(second)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def torch_images(directory: Path, noise: np.ndarray, top_k: int | None = None) -> list[Image]:
    """What diffusers' FluxPipeline draws from the same noise."""
    import torch
    from diffusers import DiffusionPipeline

    import d2m  # noqa: F401  (diffusers looks the sparse class up in it)

    pipe = DiffusionPipeline.from_pretrained(directory, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if top_k is not None:
        from d2m.model.surgery import set_top_k

        set_top_k(pipe.transformer, top_k)
    return pipe(
        PROMPTS,
        latents=torch.from_numpy(noise),
        num_inference_steps=6,
        guidance_scale=3.0,
        height=16,
        width=16,
        max_sequence_length=16,
    ).images


NOISE = packed_noise([3, 4], 4, 8, 8)
SETTINGS: dict[str, Any] = {"steps": 6, "guidance": 3.0, "height": 16, "width": 16}


@pytest.mark.parametrize("top_k", [None, 0, 4])
def test_sparse_images_are_torchs(
    tiny_sparse_dir: Path, pipeline: Pipeline, top_k: int | None
) -> None:
    expected = torch_images(tiny_sparse_dir, NOISE, top_k)
    found = pipeline(PROMPTS, latents=NOISE, top_k=top_k, **SETTINGS)
    assert psnr(found, expected) > 45
    assert pixels(expected).std() > 10, "the images must have something to compare"


def test_dense_images_are_torchs(tiny_dense_dir: Path, tiny_dense_bundle: Path) -> None:
    expected = torch_images(tiny_dense_dir, NOISE)
    found = Pipeline(tiny_dense_bundle, "ort", threads=1)(PROMPTS, latents=NOISE, **SETTINGS)
    assert psnr(found, expected) > 45


@pytest.mark.parametrize("top_k", [None, 1, [0, 1, 2, 4]])
def test_graph_and_blocks_draw_the_same(
    pipeline: Pipeline, blocks: Pipeline, top_k: int | list[int] | None
) -> None:
    first = pipeline(PROMPTS, steps=4, top_k=top_k)
    assert psnr(first, blocks(PROMPTS, steps=4, top_k=top_k)) > 60


def test_top_k_per_step_matters(pipeline: Pipeline) -> None:
    images = [pipeline("a", steps=2, top_k=k) for k in (2, [2, 2], [0, 2], [2, 0])]
    assert pixels(images[:1]).tolist() == pixels(images[1:2]).tolist()
    assert psnr(images[:1], images[2:3]) < 60 and psnr(images[2:3], images[3:]) < 60


def test_the_same_call_gives_the_same_bytes(tiny_bundle: Path, tmp_path: Path) -> None:
    files = []
    for run in range(2):
        pipeline = Pipeline(tiny_bundle, "ort", threads=1)  # opened anew
        images = pipeline(PROMPTS, seed=7, steps=3, n=2)
        assert isinstance(images, list) and len(images) == 4
        files.append([save(im, tmp_path / f"{run}-{i}.png") for i, im in enumerate(images)])
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_what_an_image_says_draws_it_again(pipeline: Pipeline) -> None:
    _, image = pipeline(PROMPTS[0], seed=11, steps=3, n=2, guidance=2.0, top_k=[1, 2, 4])
    said = settings_of(image)
    assert said["seed"] == 12 and said["bundle"] == pipeline.bundle.digest
    names = ("prompt", "seed", "steps", "guidance", "height", "width", "top_k")
    again = pipeline(**{name: said[name] for name in names})
    assert psnr([image], [again]) > 60  # another batch size may round differently


def test_seeds_and_batches(pipeline: Pipeline, tiny_bundle: Path) -> None:
    small = Pipeline(tiny_bundle, "ort", threads=1, max_batch=2)
    first = pipeline(PROMPTS, seed=[1, 50], n=3, steps=2)
    assert psnr(first, small(PROMPTS, seed=[1, 50], n=3, steps=2)) > 60
    assert [settings_of(image)["seed"] for image in first] == [1, 2, 3, 50, 51, 52]
    assert psnr(first[:1], first[1:2]) < 40
    assert psnr([pipeline(PROMPTS[1], seed=51, steps=2)], first[4:5]) > 60


def test_latents_unpacked_and_packed(pipeline: Pipeline) -> None:
    first = pipeline(PROMPTS, latents=NOISE, steps=2)
    second = pipeline(PROMPTS, latents=unpack(NOISE, 8, 8), steps=2)
    assert pixels(first).tolist() == pixels(second).tolist()
    assert settings_of(first[0])["seed"] is None


def test_another_size(pipeline: Pipeline) -> None:
    image = pipeline(PROMPTS[0], height=8, width=20, steps=2)
    assert isinstance(image, Image) and image.size == (20, 8)


def test_progress(pipeline: Pipeline, tiny_bundle: Path) -> None:
    told: list[tuple[str, int, int]] = []
    small = Pipeline(tiny_bundle, "ort", threads=1, max_batch=2)
    small("a", n=3, steps=2, progress=lambda *row: told.append(row))
    assert [done for phase, done, _ in told if phase == "denoise"] == [0, 2, 4, 4, 5, 6]
    assert {total for phase, _, total in told if phase == "denoise"} == {6}
    assert [row for row in told if row[0] == "decode"][-1] == ("decode", 3, 3)


def test_a_cut_prompt_is_logged(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "runtime"):
        pipeline("red " * 40, steps=1)
    assert sum("were left out" in record.getMessage() for record in caplog.records) == 2


def test_run_keeps_the_pipeline(tiny_bundle: Path, tiny_dense_bundle: Path) -> None:
    first = runtime.run("a red circle", tiny_bundle, steps=1, backend="ort")
    kept = next(iter(runtime._last.values()))
    second = runtime.run("a red circle", tiny_bundle, steps=1, backend="ort")
    assert next(iter(runtime._last.values())) is kept
    assert pixels([first]).tolist() == pixels([second]).tolist()
    runtime.run("a", tiny_dense_bundle, steps=1, backend="ort")
    assert next(iter(runtime._last.values())) is not kept and len(runtime._last) == 1


def test_refusals(pipeline: Pipeline, tiny_dense_bundle: Path) -> None:
    with pytest.raises(ValueError, match="height is 18, expected a multiple of 4"):
        pipeline("a", height=18)
    with pytest.raises(ValueError, match="expected none: this bundle holds a dense model"):
        Pipeline(tiny_dense_bundle, "ort")("a", top_k=2)
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        Pipeline(tiny_dense_bundle, "gpu")


def test_auto_falls_back_with_the_reason(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from runtime import opened as module

    real = module.open_component

    def refuse(bundle: Any, component: str, backend: str, **options: Any) -> Any:
        if backend == "trt-rtx":
            raise OSError("the plans need another GPU.")
        return real(bundle, component, backend, **options)

    monkeypatch.setattr(module, "choose_backend", lambda *_: ("trt-rtx", "a GPU is there"))
    monkeypatch.setattr(module, "open_component", refuse)
    with caplog.at_level(logging.WARNING, "runtime"):
        pipeline = Pipeline(tiny_bundle, "auto", threads=1)
        pipeline("a", steps=1)
    assert pipeline.backend == "ort"
    assert "backend ort in place of trt-rtx: the plans need another GPU." in caplog.text
    with pytest.raises(OSError, match="another GPU"):
        Pipeline(tiny_bundle, "trt-rtx")("a", steps=1)


def test_run_names_what_a_pipeline_takes() -> None:
    def named(function: Any) -> dict[str, Any]:
        rows = inspect.signature(function).parameters.values()
        return {
            row.name: (row.default, row.annotation) for row in rows if row.kind != row.VAR_KEYWORD
        }

    taken = named(Pipeline.__call__)
    assert list(named(runtime.run).items())[3:] == list(taken.items())[2:]


@pytest.mark.parametrize(
    "name, ours",
    [
        ("num_inference_steps", "steps="),
        ("guidance_scale", "guidance="),
        ("negative_prompt", "negative="),
        ("num_images_per_prompt", "n="),
        ("generator", "seed="),
    ],
)
def test_names_of_diffusers_are_translated(name: str, ours: str, tiny_bundle: Path) -> None:
    arguments: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=f"^{name} is diffusers' name, expected {ours}"):
        runtime.run("a", tiny_bundle, backend="ort", **arguments)


def test_arrays(pipeline: Pipeline) -> None:
    array = pipeline("a", n=2, steps=1, output_type="np")
    images = pipeline("a", n=2, steps=1)
    assert isinstance(array, np.ndarray) and array.shape == (2, 16, 16, 3)
    assert array.dtype == np.float32 and array.min() >= 0 and array.max() <= 1
    assert (array * 255).round().tolist() == pixels(images).tolist()
    assert (array * 255 % 1).any()  # not the image's bytes
    with pytest.raises(ValueError, match="output_type is 'latent', expected one of pil, np"):
        pipeline("a", steps=1, output_type="latent")


def test_an_event_cancels(pipeline: Pipeline) -> None:
    event = threading.Event()
    with pytest.raises(Cancelled):
        pipeline("a", steps=3, cancel=event, callback=lambda *_: event.set())


def test_closed_and_not_pickled(tiny_bundle: Path) -> None:
    with Pipeline(tiny_bundle, "ort", threads=1) as pipe:
        first = pipe("a", steps=1)
        assert pipe._executors
        with pytest.raises(TypeError, match="cannot be pickled.*runtime.load"):
            pickle.dumps(pipe)
    assert not pipe._executors
    assert pixels([pipe("a", steps=1)]).tolist() == pixels([first]).tolist()
