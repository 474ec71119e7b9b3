"""A program of plans worked out without a device: launches in order, buffers in one arena."""

import copy
from pathlib import Path

import pytest

from runtime.bundle.directory import Bundle
from runtime.cuda.arena import Buffer
from runtime.trt.launch_schedule import LaunchSchedule, dimension_size, make_launch_schedule
from tests.stand_ins.device import SIZES, TARGET, bundle_with_plans


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_with_plans(tiny_bundle, tmp_path_factory.mktemp("plans") / "bundle")


def schedule_of(bundle: Bundle, **sizes: int) -> LaunchSchedule:
    component, plans = bundle.component("transformer"), bundle.manifest["plans"][TARGET]
    return make_launch_schedule("transformer", component, plans, SIZES | sizes, 2)


def test_a_schedule_is_the_program_in_order(bundle: Bundle) -> None:
    schedule = schedule_of(bundle)
    program = bundle.component("transformer")["program"]
    assert [launch.plan.partition("/")[2].partition(".")[0] for launch in schedule.launches] == [
        call["type"] for call in program
    ]
    second = schedule.launches[2]
    assert second.plan == "transformer/double.k2"
    assert second.weights["attn.to_qkv.weight"] == "transformer_blocks.1.attn.to_qkv.weight"
    assert set(second.outputs) == {"out_hidden_states", "out_encoder_hidden_states"}
    first = schedule.launches[1]
    assert second.inputs["hidden_states"] is first.outputs["out_hidden_states"]
    assert second.inputs["rope_cos"] is schedule.inputs["rope_cos"]
    assert schedule.outputs["sample"].shape == (2, 16, 16)


def test_buffers_that_live_together_do_not_overlap(bundle: Bundle) -> None:
    schedule = schedule_of(bundle)
    readers: dict[int, int] = {id(b): len(schedule.launches) for b in schedule.outputs.values()}
    for index, launch in enumerate(schedule.launches):
        for buffer in launch.inputs.values():
            readers[id(buffer)] = max(readers.get(id(buffer), 0), index)
    live: list[Buffer] = list(schedule.inputs.values())
    everything = list(live)
    for index, launch in enumerate(schedule.launches):
        live += launch.outputs.values()
        everything += launch.outputs.values()
        spans = sorted((buffer.offset, buffer.offset + buffer.size) for buffer in live)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
        assert spans[0][0] >= 0 and spans[-1][1] <= schedule.arena
        live = [buffer for buffer in live if readers.get(id(buffer), -1) > index]
    assert all(buffer.offset % 256 == 0 for buffer in everything)
    assert schedule.arena < sum(buffer.size for buffer in everything)


def test_a_schedule_takes_its_types_and_sizes_from_the_plans(bundle: Bundle) -> None:
    """Plans in bfloat16 for a float32 bundle: half the bytes, the manifest's names."""
    half = copy.deepcopy(bundle.manifest["plans"][TARGET])
    for io in half["tensors"].values():
        for row in (*io["inputs"], *io["outputs"]):
            if row["dtype"] == "float32" and row["name"] != "gate.weight":
                row["dtype"] = "bfloat16"
    component = bundle.component("transformer")
    small = make_launch_schedule("transformer", component, half, SIZES, 2)
    full = schedule_of(bundle)
    assert small.outputs["sample"].dtype == "bfloat16"
    assert small.outputs["sample"].size * 2 == full.outputs["sample"].size
    del half["tensors"]["transformer/double.k2"]
    with pytest.raises(ValueError, match="has no plan transformer/double.k2, only"):
        make_launch_schedule("transformer", component, half, SIZES, 2)


def test_dimensions_are_names_sums_and_multiples() -> None:
    sizes = {"a": 3, "image_tokens": 5, "text_tokens": 2}
    assert [
        dimension_size(dim, sizes) for dim in (7, "a", "tokens", "2*a", "a + 8 * image_tokens")
    ] == [*(7, 3, 7, 6, 43)]
    with pytest.raises(ValueError, match="a dimension 'b', expected one of a, image_tokens"):
        dimension_size("b", sizes)
