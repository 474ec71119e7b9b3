"""Groups and shared modulation on blocks cut at their experts: all but the driver call."""

import numpy as np
import pytest

from runtime.bundle.directory import Bundle
from runtime.ort.component import open_component as open_ort
from runtime.program.block_forecast import forecast
from runtime.trt.launches import Launch
from tests.stand_ins.segments import bundle_with_segments, plans_with_cubins
from tests.tiny.grouped import GROUPS, KAPPAS, differing, feed_of, load_transformer

Given = tuple[Bundle, dict[str, np.ndarray]]


@pytest.fixture(scope="module", params=["grouped", "forecast"])
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Routers that read the picture; alpha 0 with one modulation for all blocks."""
    name = request.param
    model = load_transformer(request.getfixturevalue(f"tiny_{name}_dir"))
    root = tmp_path_factory.mktemp(name) / "bundle"
    made = bundle_with_segments(request.getfixturevalue(f"tiny_{name}_bundle"), root)
    return made, feed_of(model, differing(model))


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(found["sample"], expected["sample"], rtol=5e-4, atol=5e-5)


def test_segments_and_kernels_give_what_onnx_runtime_gives(given: Given) -> None:
    """A batch whose samples choose different blocks, every kappa, twice; and one sample of it."""
    bundle, feed = given
    executor = plans_with_cubins(bundle)
    blocks = open_ort(bundle, "transformer", threads=1, mode="blocks")
    single = {name: v if name.startswith("rope") else v[1:2] for name, v in feed.items()}
    for _ in range(2):
        for kappa in KAPPAS:
            for inputs, top_k in ((feed, 2), (single, 1)):
                close(executor(inputs, top_k, kappa), blocks(inputs, top_k, kappa))


def test_every_block_that_runs_is_cut(given: Given) -> None:
    """One sample at kappa 1: two kernels' places in a double block, one in a single one."""
    bundle, feed = given
    executor = plans_with_cubins(bundle)
    one = {name: v if name.startswith("rope") else v[:1] for name, v in feed.items()}
    for _ in range(2):  # schedules made before the arena grew are dropped
        executor(one, 2, 1)
    launches = [x for ready in executor._ready.values() for x in ready.schedule.launches]
    assert all(isinstance(launch, Launch) for launch in launches)
    places = set(bundle.manifest["plans"][executor.target]["experts"])
    names = [launch.plan for launch in launches]
    run = sum(name in places for name in names)
    component = bundle.component("transformer")
    grouped = {int(call) for group in component["groups"].values() for call in group["calls"]}
    kinds = [row["type"] for row in component["program"]]
    free = [kind for call, kind in enumerate(kinds) if call not in grouped]
    wanted = sum({"double": 2, "single": 1}.get(kind, 0) for kind in free) + 2 + 1
    assert run == wanted
    assert not {"transformer/double.k2", "transformer/single.k2"} & set(names)


def test_a_known_schedule_is_recorded_with_its_kernels(given: Given) -> None:
    """alpha 0: one piece without routers, replayed as a CUDA graph from the third run on."""
    bundle, feed = given
    component = bundle.component("transformer")
    if any(group["alpha"] for group in component["groups"].values()):
        pytest.skip("its routers read the picture")
    executor = plans_with_cubins(bundle, graphs=True)
    blocks = open_ort(bundle, "transformer", threads=1, mode="blocks")
    (known,) = forecast(component, blocks.block, [feed], [1])
    assert set(known) == set(GROUPS)
    for _ in range(4):
        close(executor(feed, 2, 1, known), blocks(feed, 2, 1, known))
