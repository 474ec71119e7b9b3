"""The executor of plans, all but the launch (tests/stand_ins/device.py has what it runs on
here)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.directory import Bundle
from runtime.cuda.device import Device
from runtime.files.tensors import cast
from runtime.ort.component import open_component as open_ort
from runtime.trt import component as trt
from runtime.trt.component import Plans
from runtime.trt.launch_schedule import check_profiles
from runtime.trt.plan_choice import choose_target
from tests.stand_ins.device import TARGET, HostContext, HostDevice, bundle_with_plans, inputs


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_with_plans(tiny_bundle, tmp_path_factory.mktemp("plans") / "bundle")


def plans_of(bundle: Bundle, component: str = "transformer", **options: Any) -> Plans:
    device = HostDevice()
    load = lambda _, path: HostContext(path, device)  # noqa: E731
    return Plans(bundle, component, TARGET, device, load, **options)


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-5)


# ---------------------------------------------------------------- the executor


def test_plans_give_what_onnx_runtime_gives(bundle: Bundle) -> None:
    """Every component; sizes that grow, shrink and come back; every number of experts."""
    for component in ("text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder"):
        given = inputs(bundle, component)
        close(plans_of(bundle, component)(given), open_ort(bundle, component, threads=1)(given))
    executor, blocks = plans_of(bundle), open_ort(bundle, "transformer", threads=1, mode="blocks")
    for seed, (sizes, k) in enumerate(
        [({}, None), ({"batch": 3}, 4), ({"image_tokens": 4, "tokens": 20}, 1), ({}, 0), ({}, 2)]
    ):
        given = inputs(bundle, "transformer", seed, **sizes)
        close(executor(given, k), blocks(given, k))


def test_weights_are_uploaded_once_and_shared_by_all_top_k(bundle: Bundle) -> None:
    executor = plans_of(bundle)
    given = inputs(bundle, "transformer")
    executor(given, 1)
    before = executor.device.uploads
    executor(given, 4)
    assert executor.device.uploads == before + len(given)
    weights = {name for name, _ in executor.memory.weights}
    experts = [name for name in weights if name.endswith(".experts.w1")]
    assert len(experts) == 6  # two streams of two double blocks, two single blocks
    assert all(dtype == "float32" for _, dtype in executor.memory.weights)


def test_a_plan_is_loaded_once_for_all_its_blocks(bundle: Bundle) -> None:
    executor, loaded = plans_of(bundle), []
    load = executor.load
    executor.load = lambda data, path: (loaded.append(Path(path).name), load(data, path))[1]
    executor(inputs(bundle, "transformer"), 2)
    executor(inputs(bundle, "transformer", batch=1), 2)
    assert sorted(loaded) == ["double.k2.plan", "embed.plan", "final.plan", "single.k2.plan"]


def test_memory_is_given_back(bundle: Bundle) -> None:
    executor = plans_of(bundle)
    executor(inputs(bundle, "transformer"), 1)
    executor(inputs(bundle, "transformer", batch=3), 1)
    device = executor.device
    assert len(device.memory) == 3  # weights, arena, scratch
    del executor
    assert not device.memory


def test_one_block_alone(bundle: Bundle) -> None:
    executor, blocks = plans_of(bundle), open_ort(bundle, "transformer", threads=1, mode="blocks")
    rng = np.random.default_rng(0)
    shapes = {"temb": (2, 32), "rope_cos": (24, 16), "rope_sin": (24, 16)}
    shapes |= {"hidden_states": (2, 16, 32), "encoder_hidden_states": (2, 8, 32)}
    given = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    for kind, prefix in (
        ("double", "transformer_blocks.1."),
        ("single", "single_transformer_blocks.0."),
    ):
        close(executor.block(kind, prefix, given, 1), blocks.block(kind, prefix, given, 1))


def test_recorded_graphs_are_replayed_and_dropped_when_memory_moves(bundle: Bundle) -> None:
    executor, plain = plans_of(bundle, graphs=True), plans_of(bundle)
    for seed in range(4):
        given = inputs(bundle, "transformer", seed)
        close(executor(given), plain(given))
    (ready,) = executor._ready.values()
    assert ready.graph and ready.runs == 2
    large = inputs(bundle, "transformer", batch=4)
    close(executor(large), plain(large))
    given = inputs(bundle, "transformer", 9)
    close(executor(given), plain(given))


def test_sizes_outside_the_profiles_are_refused(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="batch is 5, expected 1 to 4, the range that the plans"):
        plans_of(bundle)(inputs(bundle, "transformer", batch=5))
    row = {"profiles": {"text_tokens": [1, 1, 9], "clip.text_tokens": [7, 7, 7]}}
    check_profiles("t", "t5", row, {"text_tokens": 8})
    with pytest.raises(ValueError, match="text tokens is 8, expected 7 to 7"):
        check_profiles("t", "clip", row, {"text_tokens": 8})


def test_a_number_of_experts_without_a_plan(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="top_k is 3, expected one of 0, 1, 2, 4"):
        plans_of(bundle)(inputs(bundle, "transformer"), 3)


def test_cast_keeps_bits_and_rounds() -> None:
    values = np.array([1.0, 1 + 2**-9, -3.5], np.float32)
    bits = cast(values, "bfloat16")
    assert bits.dtype == np.uint16 and cast(bits, "bfloat16") is not None
    np.testing.assert_array_equal(cast(bits, "float32"), [1.0, 1.0, -3.5])
    np.testing.assert_array_equal(cast(bits, "float16"), np.array([1, 1, -3.5], np.float16))
    assert cast(np.arange(3), "int32").dtype == np.int32


# ---------------------------------------------------------------- what fits this machine


def targets(bundle: Bundle, **rows: dict[str, Any]) -> Bundle:
    base = {"api": "tensorrt_rtx", "version": "1.7.1.116", "compute_capabilities": []}
    plans = {name.replace("_", "-"): base | row for name, row in rows.items()}
    return Bundle(bundle.path, {"plans": plans}, "")


def test_plans_for_this_gpu_go_before_portable_ones(bundle: Bundle) -> None:
    both = targets(bundle, portable={}, sm89={"compute_capabilities": [86, 89]})
    assert choose_target(both, "tensorrt_rtx", "1.7.1.116", 89) == "sm89"
    assert choose_target(both, "tensorrt_rtx", "1.7.1.116", 120) == "portable"
    assert choose_target(both, "tensorrt_rtx", "1.7.1.116") == "sm89"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"version": "1.6.0.1"}, "p: built with release 1.6.0.1, here is 1.7.1.116"),
        ({"api": "tensorrt"}, "p: built with tensorrt"),
        (
            {"compute_capabilities": [86, 120]},
            "p: built for compute capability 8.6, 12.0, this GPU has 8.9",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_named_with_its_cure(
    bundle: Bundle, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError) as caught:
        choose_target(targets(bundle, p=row), "tensorrt_rtx", "1.7.1.116", 89)
    text = str(caught.value)
    assert reason in text and "d2m export PIPELINE -o NEW" in text and "--trt-rtx --sm 89" in text


def test_an_old_gpu_and_a_bundle_without_plans(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="8.0 and up, this GPU has 7.5"):
        choose_target(targets(bundle, p={}), "tensorrt_rtx", "1.7.1.116", 75)
    with pytest.raises(ValueError, match="has no plans, expected plans for tensorrt 10.9"):
        choose_target(targets(bundle), "tensorrt", "10.9")


def test_without_a_driver_one_sentence_says_so(bundle: Bundle) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    cuda = pytest.importorskip("cuda.bindings.runtime")
    if int(cuda.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("this machine has a driver")
    plans = targets(bundle, portable={"version": rtx.__version__})
    for run in (Device, lambda: trt.open_component_rtx(plans, "transformer")):
        with pytest.raises(OSError, match="needs an NVIDIA one .*; use --backend ort") as caught:
            run()
        assert str(caught.value).count(". ") == 0


def test_a_missing_library_is_named() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"install with: pip install .*\[trt\]'"):
            trt.open_component(Bundle(Path("."), {}, ""), "transformer")


@pytest.mark.tensorrt
def test_the_manifest_is_asked_before_the_library(bundle: Bundle) -> None:
    """A plan of another release is refused by the manifest, driver or not."""
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(ValueError, match="built with release 1.0.0, here is"):
        trt.open_component_rtx(targets(bundle, p={"version": "1.0.0"}), "transformer")


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_plans_run_on_a_gpu(tiny_sparse_dir: Path, tmp_path: Path) -> None:
    """The launch itself: plans in float32 give what ONNX Runtime gives."""
    pytest.importorskip("tensorrt_rtx")
    from export.bundle import export_bundle
    from runtime.bundle.directory import open_bundle

    export_bundle(tiny_sparse_dir, tmp_path / "b", trt_rtx=True, top_k=(0, 2), plan_dtype="fp32")
    bundle = open_bundle(tmp_path / "b")
    for component in bundle.manifest["components"]:
        try:
            executor = trt.open_component_rtx(bundle, component)
        except ValueError as error:  # a GPU that TensorRT-RTX does not know, such as an H200
            pytest.skip(str(error))
        for batch in (1, 3):
            given = inputs(bundle, component, batch=batch)
            close(executor(given), open_ort(bundle, component, threads=1)(given))
