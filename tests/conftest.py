"""Marks that need hardware or an extra are skipped, with the reason, where it is missing."""

import hashlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# One thread per process: two OpenMP threads beside other load are slower than one,
# and sums come out in the same order on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def _cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


# Files that take longest, in this order: they start first, so that no process is left alone with
# one at the end (loadfile gives a file to one process; ./scripts/test keeps this order).
SLOWEST = (
    "tests/families/test_families.py",
    "tests/d2m/cli/test_commands.py",
    "tests/families/test_flux2.py",
    "tests/d2m/distill/test_many_processes.py",
    "tests/scripts/test_faults.py",
    "tests/export/families/test_modulation.py",
    "tests/d2m/model/test_components.py",
    "tests/scripts/gpu/test_gpu.py",
    "tests/d2m/kernels/test_values.py",
    "tests/scripts/teacher/test_train.py",
    "tests/export/checkpoint/test_shared_shards.py",
    "tests/d2m/convert/test_first_student.py",
    "tests/test_pages.py",
    "tests/test_readme.py",
    "tests/d2m/distill/test_checkpoint.py",
    "tests/export/graph/test_shares.py",
    "tests/d2m/convert/test_in_memory.py",
    "tests/export/plans/test_build.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(SLOWEST)))
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    names = ("tensorrt_rtx", "tensorrt")
    if not any(importlib.util.find_spec(name) for name in names):
        for item in items:
            if item.get_closest_marker("tensorrt"):
                item.add_marker(pytest.mark.skip(reason="no tensorrt_rtx and no tensorrt"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes of the tests' bundles are not remembered in the user's cache.

    Changed bundles are opened without a trial, but in its own tests (runtime.bundle.trial).
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2M_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("D2M_TRIAL", "never")
        yield


# ---------------------------------------------------------------- tiny models, made once a session


@pytest.fixture(scope="session")
def tiny_dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense FluxPipeline directory (see tiny.py)."""
    pytest.importorskip("diffusers")
    from tests.tiny.pipeline import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("tiny") / "dense")


@pytest.fixture(scope="session")
def tiny_sparse_dir(tiny_dense_dir: Path) -> Path:
    """The same model converted, not trained: neurons split at random, gates of N(0, 1).

    Such gates leave no doubt about which experts are chosen, so that outputs can be compared.
    """
    import torch
    from diffusers import DiffusionPipeline

    from d2m.families import FLUX
    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel
    from d2m.model.surgery import convert_state_dict, sites_of, sparse_ffns, split_neurons
    from d2m.recipe.recipe import SparseSpec

    pipe = DiffusionPipeline.from_pretrained(tiny_dense_dir, local_files_only=True)
    state, generator = pipe.transformer.state_dict(), torch.Generator().manual_seed(1)
    width = pipe.transformer.inner_dim
    permutations = {
        name: split_neurons(torch.rand(4 * width, generator=generator), width, 12)
        for name, _, _ in sites_of(state, FLUX)
    }
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    sparse = SparseFluxTransformer2DModel(**config).eval()
    sparse.load_state_dict(convert_state_dict(state, permutations, SparseSpec(), FLUX))
    for ffn in sparse_ffns(sparse).values():
        torch.nn.init.normal_(ffn.gate.weight, generator=generator)
    pipe.register_modules(transformer=sparse)
    path = tiny_dense_dir.parent / "sparse"
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_sparse_dir: Path, pytestconfig: pytest.Config) -> Path:
    """The sparse model's bundle: float32, top_k 0, 1, 2 (the default) and 4. Not to be changed."""
    return exported(pytestconfig, tiny_sparse_dir, top_k=(0, 1, 2, 4))


@pytest.fixture(scope="session")
def tiny_dense_bundle(tiny_dense_dir: Path, pytestconfig: pytest.Config) -> Path:
    """The dense model's bundle. Not to be changed."""
    return exported(pytestconfig, tiny_dense_dir)


@pytest.fixture(scope="session")
def tiny_guided_bundle(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Path:
    """The bundle of a dense PixArt, drawn with negative prompts. Not to be changed."""
    pytest.importorskip("diffusers")
    from d2m.families.generation_defaults import write_defaults
    from tests.tiny.families import SIZE, pixart

    path = tmp_path_factory.mktemp("guided") / "guided"
    pixart().save_pretrained(path)
    write_defaults(path, height=SIZE, width=SIZE)
    return exported(pytestconfig, path)


@pytest.fixture(scope="session")
def tiny_grouped_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse pipeline with groups of blocks, routers of alpha .5 (see tinygrouped.py)."""
    pytest.importorskip("diffusers")
    from tests.tiny.grouped import grouped_pipeline

    return grouped_pipeline(tmp_path_factory.mktemp("grouped") / "grouped", 0.5)


@pytest.fixture(scope="session")
def tiny_forecast_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a one with alpha 0, where a schedule is known beforehand, and shared modulation."""
    pytest.importorskip("diffusers")
    from tests.tiny.grouped import grouped_pipeline

    return grouped_pipeline(tmp_path_factory.mktemp("grouped") / "forecast", 0.0, adaln="single")


@pytest.fixture(scope="session")
def tiny_grouped_bundle(tiny_grouped_dir: Path, pytestconfig: pytest.Config) -> Path:
    """Its bundle: float32, top_k 1 and 2. Not to be changed."""
    return exported(pytestconfig, tiny_grouped_dir, top_k=(1, 2))


@pytest.fixture(scope="session")
def tiny_forecast_bundle(tiny_forecast_dir: Path, pytestconfig: pytest.Config) -> Path:
    """The bundle of alpha 0. Not to be changed."""
    return exported(pytestconfig, tiny_forecast_dir, top_k=(1, 2))


def exported(config: pytest.Config, pipeline: Path, **options: object) -> Path:
    """Export a pipeline directory, or take the bundle that the same sources made before.

    The cache lies in .pytest_cache and is keyed by everything that a tiny model and its bundle are
    made from.
    """
    pytest.importorskip("onnx")
    from export.bundle import export_bundle
    from tests.tiny.traces import sources

    key = hashlib.sha256(repr((pipeline.name, options)).encode())
    key.update(sources("d2m", "export", "runtime", "tests/tiny") + Path(__file__).read_bytes())
    bundles = config.cache.mkdir("tiny-bundles")
    out = bundles / key.hexdigest()[:16] / f"{pipeline.name}-bundle"
    if not (out / "manifest.json").is_file():
        remove_old(bundles)
        export_bundle(pipeline, out, **options)
    return out


@pytest.fixture(scope="session", autouse=True)
def kept_traces(pytestconfig: pytest.Config) -> Iterator[None]:
    """An export traces what was traced before in no time (see tests/tiny/traces.py)."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "onnx", "onnxscript")):
        yield
        return
    from tests.tiny.traces import kept

    traces = pytestconfig.cache.mkdir("traces")
    remove_old(traces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.graph.blocks.trace", kept(traces))
        yield


def remove_old(folder: Path) -> None:
    """Remove what a day has passed over."""
    for old in folder.iterdir():
        if time.time() - old.stat().st_mtime > 86_400:
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)


def _child(initializer: Callable[[], None]) -> Iterator[Callable[..., Any]]:
    """A process for the Triton kernels: one interprets, one compiles (tests/cases/kernels.py)."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (Linux x86-64: pip install -e '.[dev]')")
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer) as pool:
        yield lambda function, *args, **kw: pool.submit(function, *args, **kw).result()


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """interpreted(function, ...): its result, from a process where kernels are interpreted."""
    from tests.cases import kernels

    yield from _child(kernels.start_interpreter)


@pytest.fixture(scope="session")
def compiled() -> Iterator[Callable[..., Any]]:
    """compiled(function, ...): its result, from a process where kernels are compiled."""
    from tests.cases import kernels

    yield from _child(kernels.start_compiler)
