"""`d2m bench`: what it measures, on which side a ratio stands, and what it says of memory."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2m.cli import main
from runtime.measure import bench
from runtime.measure import bench_facts as benchfacts
from runtime.measure import cold_start as coldstart
from runtime.measure.block_times import BlockTimer, table
from runtime.pipeline import Pipeline
from runtime.trt.component import Plans
from tests.stand_ins.device import TARGET, HostContext, HostDevice, bundle_with_plans

KNOBS = {"steps": 2, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def answer(tiny_bundle: Path, tiny_dense_bundle: Path) -> dict[str, Any]:
    return bench.bench(tiny_bundle, tiny_dense_bundle, runs=2, batches=(1, 3), steps=2)


def test_sparse_against_dense(answer: dict[str, Any]) -> None:
    for name, kind in (("bundle", "sparse"), ("vs", "dense")):
        row = answer[name]
        assert row["kind"] == kind and row["backend"] == "ort" and len(row["digest"]) == 64
        cold = row["cold"]
        assert cold["first_image_s"] > cold["generate_s"] > 0 and cold["open_s"] > 0
        assert 20 < cold["peak_mib"] < 2000 and row["memory"]["device_mib"] is None
        for images in row["images"].values():
            assert images["image_s"] > 0
            assert images["steps_per_s"] == pytest.approx(1 / images["step_s"], rel=0.01)
        blocks = {line["type"]: line for line in row["blocks"]}
        assert list(blocks) == ["embed", "double", "single", "final"]
        assert [blocks[name]["calls"] for name in blocks] == [1, 2, 2, 1]
        assert sum(line["share"] for line in row["blocks"]) == pytest.approx(1, abs=1e-3)
    assert list(answer["ratios"]["images"]) == ["1", "3"]
    assert set(answer["ratios"]["cold"]) == {"start", "open", "generate", "first_image", "peak"}
    assert set(answer["ratios"]["blocks"]) == {"embed", "double", "single", "final"}
    assert answer["settings"]["steps"] == 2 and answer["differences"] == []
    json.dumps(answer)


def test_weights_of_a_block_are_those_in_the_file(
    answer: dict[str, Any], tiny_dense_bundle: Path
) -> None:
    """Float32 here: all blocks of a type together weigh what the transformer's file does."""
    weights = sum(row["calls"] * row["weights_mib"] for row in answer["vs"]["blocks"])
    size = (tiny_dense_bundle / "transformer.safetensors").stat().st_size / (1 << 20)
    assert weights == pytest.approx(size, rel=0.05)


def test_ratios_are_of_pairs_and_above_one_where_the_bundle_is_faster() -> None:
    rows = {
        "bundle": [{"image_s": 1.0}, {"image_s": 10.0}, {"image_s": 2.0}],
        "vs": [{"image_s": 2.0}, {"image_s": 30.0}, {"image_s": 2.0}],
    }
    assert bench.ratios(rows) == {"image": {"median": 2.0, "range": [1.0, 3.0]}}  # type: ignore[arg-type]


def test_turns_alternate_and_the_first_only_warms_up() -> None:
    calls: list[tuple[int, str]] = []

    def measure(name: str, turn: int) -> dict[str, float | None]:
        calls.append((turn, name))
        return {"turn": float(turn)}

    rows = bench.take_turns("ab", 2, measure, lambda *_: None, "x", warm_up=True)
    assert calls == [(-1, "b"), (-1, "a"), (0, "a"), (0, "b"), (1, "b"), (1, "a")]
    assert rows == {name: [{"turn": 0.0}, {"turn": 1.0}] for name in "ab"}


def test_differences_are_told(tiny_bundle: Path) -> None:
    ours, other = Pipeline(tiny_bundle), Pipeline(tiny_bundle)
    other.manifest = other.manifest | {"storage_dtype": "bfloat16"}
    assert benchfacts.differences({"bundle": ours, "vs": other}) == [
        "storage_dtype: float32 against bfloat16",
        "kind: the baseline is sparse, expected dense",
    ]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_a_child_does_not_report_its_parents_memory(tiny_bundle: Path) -> None:
    ballast = np.ones(300 << 20, np.uint8)
    assert coldstart.peak() > 300  # type: ignore[operator]
    settings = {"backend": "ort", "threads": 1, "prompt": "a circle", "knobs": KNOBS}
    assert coldstart.time_cold_start(tiny_bundle, settings)["peak_mib"] < 300  # type: ignore[operator]
    del ballast


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    settings = {"backend": "ort", "threads": 1, "prompt": "a circle", "knobs": KNOBS}
    with pytest.raises(ValueError, match="a new process cannot generate .*manifest.json"):
        coldstart.time_cold_start(tmp_path, settings)


def test_groups_count_what_a_step_runs_and_time_their_routers(tiny_grouped_bundle: Path) -> None:
    pipeline = Pipeline(tiny_grouped_bundle)
    timer = BlockTimer(pipeline, bench.first_inputs(pipeline, KNOBS), None)
    component = pipeline.bundle.component("transformer")
    groups = component["groups"].values()
    turns = [timer.turn()]
    for kappa in (1, 2):
        rows = table(pipeline, turns, kappa)
        routers = {group["type"] for group in groups}
        asked = sum(row["run"] for row in rows if row["type"] in routers)
        run = sum(row["run"] for row in rows) - asked
        left_out = sum(len(group["calls"]) - kappa for group in groups)
        assert asked == len(groups) > 0
        assert run == len(component["program"]) - left_out
    assert sum(len(times) for times in turns[0].values()) == len(component["program"]) + len(groups)


def test_plans_are_timed_too_and_their_memory_counted(tiny_bundle: Path, tmp_path: Path) -> None:
    """The executor of plans on memory of this process: blocks, and bytes held on the device."""
    bundle = bundle_with_plans(tiny_bundle, tmp_path / "bundle")
    device = HostDevice()
    plans = Plans(bundle, "transformer", TARGET, device, lambda _, path: HostContext(path, device))
    pipeline = Pipeline(bundle, "ort")
    feed = bench.first_inputs(pipeline, KNOBS)
    pipeline._executors["transformer"] = plans
    assert benchfacts.device_bytes(plans) == 0
    turn = BlockTimer(pipeline, feed, 1).turn()
    assert {kind: len(times) for kind, times in turn.items()} == {
        "embed": 1, "double": 2, "single": 2, "final": 1,
    }  # fmt: skip
    held = benchfacts.device_bytes(plans)
    allocated = sum(len(array) - 256 for array in device.memory.values())
    assert held == allocated > 0


def test_the_command_prints_tables_or_json(
    tiny_bundle: Path, tiny_dense_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", str(tiny_bundle), "--runs", "1", "--steps", "1"]
    assert main([*arguments, "--vs", str(tiny_dense_bundle)]) == 0
    text = capsys.readouterr().out
    for words in ("cold start to first image, s", "steps a second, batch 1", "ratio", "single"):
        assert words in text
    assert main([*arguments, "--json", "--top-k", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["top_k"] == 1 and "vs" not in told
