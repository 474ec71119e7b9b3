"""Groups of blocks on plans, all but the launch: what is asked, launched, copied and recorded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.block_groups import first_calls
from runtime.bundle.directory import Bundle
from runtime.ort.component import open_component as open_ort
from runtime.program.block_forecast import forecast
from runtime.trt.component import Plans
from runtime.trt.launches import Copy, Launch, spans
from tests.stand_ins.device import TARGET, HostContext, HostDevice, bundle_with_plans
from tests.tiny.grouped import GROUPS, KAPPAS, chosen, differing, feed_of, load_transformer

Given = tuple[Bundle, dict[str, np.ndarray], dict[int, list[list[int]]]]


def given(directory: Path, bundle: Path, root: Path) -> Given:
    """A bundle with plans, inputs whose samples choose differently, and what they choose."""
    model = load_transformer(directory)
    inputs = differing(model)
    starts = {kappa: chosen(model, inputs, kappa) for kappa in (1, 2)}
    return bundle_with_plans(bundle, root / "bundle"), feed_of(model, inputs), starts


@pytest.fixture(scope="module")
def grouped(
    tiny_grouped_dir: Path, tiny_grouped_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Given:
    return given(tiny_grouped_dir, tiny_grouped_bundle, tmp_path_factory.mktemp("grouped"))


@pytest.fixture(scope="module")
def beforehand(
    tiny_forecast_dir: Path, tiny_forecast_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Given:
    return given(tiny_forecast_dir, tiny_forecast_bundle, tmp_path_factory.mktemp("forecast"))


class Counting(HostDevice):
    """Counts downloads: each is a wait for the device."""

    downloads = 0

    def download(self, address: int, array: np.ndarray) -> None:
        assert self.recording is None, "nothing may wait inside a recording"
        self.downloads += 1
        super().download(address, array)


def plans_of(bundle: Bundle, **options: Any) -> Plans:
    device = Counting()
    return Plans(
        bundle, "transformer", TARGET, device, lambda _, path: HostContext(path, device), **options
    )


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(found["sample"], expected["sample"], rtol=5e-4, atol=5e-5)


def one(feed: dict[str, np.ndarray], sample: int) -> dict[str, np.ndarray]:
    """One sample of a batch; the rotary tables are of all."""
    return {
        name: value if name.startswith("rope") else value[sample : sample + 1]
        for name, value in feed.items()
    }


def test_plans_give_what_onnx_runtime_gives(grouped: Given) -> None:
    """A batch that chooses differently, sizes that come and go, every kappa; twice each."""
    bundle, feed, _ = grouped
    executor, blocks = plans_of(bundle), open_ort(bundle, "transformer", threads=1, mode="blocks")
    for _ in range(2):
        for kappa in KAPPAS:
            for inputs, top_k in ((feed, 2), (one(feed, 1), 1), (feed, 1), (one(feed, 0), 2)):
                close(executor(inputs, top_k, kappa), blocks(inputs, top_k, kappa))
    close(executor(feed), blocks(feed, 2, 1))


def test_what_is_not_chosen_is_not_launched(grouped: Given) -> None:
    bundle, feed, starts = grouped
    executor = plans_of(bundle)
    for kappa in KAPPAS:
        executor._ready.clear()
        before = executor.device.downloads
        executor(feed, 2, kappa)
        waits = executor.device.downloads - before
        assert waits == (3 if kappa < 3 else 1), "a wait per group that chooses, one for the answer"
        launched: dict[str, int] = {}
        copies = 0
        for ready in executor._ready.values():
            for launch in ready.schedule.launches:
                if isinstance(launch, Copy):
                    copies += 1
                    continue
                if block := launch.weights.get("attn.to_qkv.weight"):
                    launched[block.partition(".attn.")[0]] = launch.inputs["temb"].shape[0]
        for (name, (_, blocks)), chosen_here in zip(GROUPS.items(), starts.get(kappa, [[], []])):
            for offset, block in enumerate(blocks):
                rows = sum(start <= offset < start + kappa for start in chosen_here)
                assert launched.get(f"{name}.blocks.{block}", 0) == (4 if kappa == 3 else rows)
        assert (copies > 0) == (kappa < 3)


def test_a_whole_batch_that_agrees_is_not_copied(grouped: Given) -> None:
    bundle, feed, _ = grouped
    executor = plans_of(bundle)
    executor(one(feed, 0), 2, 1)
    launches = [x for ready in executor._ready.values() for x in ready.schedule.launches]
    assert all(isinstance(launch, Launch) for launch in launches)
    names = [launch.plan.partition("/")[2] for launch in launches]
    assert names == [
        *("embed", "double.k2", "router", "double.k2", "router"),
        *("single.k2", "single.k2", "final"),
    ]


def test_a_known_schedule_waits_for_nothing_and_is_recorded(beforehand: Given) -> None:
    """alpha 0: one piece, no router between blocks, a CUDA graph from the second run on."""
    bundle, feed, starts = beforehand
    executor = plans_of(bundle, graphs=True)
    blocks = open_ort(bundle, "transformer", threads=1, mode="blocks")
    component = bundle.component("transformer")
    for kappa in (1, 2):
        (known,) = forecast(component, executor.block, [feed], [kappa])
        assert [known[name].tolist() for name in GROUPS] == starts[kappa]
        (same,) = forecast(component, blocks.block, [feed], [kappa])
        assert all((same[name] == known[name]).all() for name in GROUPS)
        before = executor.device.downloads
        close(executor(feed, 2, kappa, known), blocks(feed, 2, kappa, known))
        assert executor.device.downloads == before + 1
        close(blocks(feed, 2, kappa, known), blocks(feed, 2, kappa))
    sample = one(feed, 2)
    (known,) = forecast(component, executor.block, [sample], [1])
    executor._ready.clear()
    for _ in range(4):
        close(executor(sample, 2, 1, known), blocks(sample, 2, 1))
    (ready,) = executor._ready.values()
    assert ready.graph and ready.runs == 2 and ready.fixed_shapes
    assert "router" not in str([launch.plan for launch, _, _ in ready.bindings])


def test_many_choices_do_not_pile_up(grouped: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, feed, _ = grouped
    monkeypatch.setattr("runtime.trt.component.MAX_READY", 4)
    executor, blocks = plans_of(bundle), open_ort(bundle, "transformer", threads=1, mode="blocks")
    for sample in range(4):
        for kappa in KAPPAS:
            close(executor(one(feed, sample), 2, kappa), blocks(one(feed, sample), 2, kappa))
            assert len(executor._ready) <= 4


def test_rows_are_copied_in_spans() -> None:
    rows = np.array([0, 1, 3, 5, 6, 7])
    assert spans(rows, into=True) == ((0, 0, 2), (2, 3, 1), (3, 5, 3))
    assert spans(rows, into=False) == ((0, 0, 2), (3, 2, 1), (5, 3, 3))


def test_routers_choose_as_on_the_host(grouped: Given) -> None:
    bundle, feed, starts = grouped
    executor = plans_of(bundle)
    shapes = {"hidden_states": (3, 16, 32), "encoder_hidden_states": (3, 8, 32), "temb": (3, 32)}
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    blocks = open_ort(bundle, "transformer", threads=1, mode="blocks")
    for name in GROUPS:
        found = executor.block("router", f"{name}.", inputs)["logits"]
        expected = blocks.block("router", f"{name}.", inputs)["logits"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert (first_calls(found, 2) == first_calls(expected, 2)).all()
