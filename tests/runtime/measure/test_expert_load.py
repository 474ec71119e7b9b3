"""Tokens counted by expert: against torch's routers, sampled within bounds, images left alone."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.bundle.directory import open_bundle
from runtime.measure.expert_load import (
    CountingBlocks,
    Meter,
    Sampler,
    Step,
    choices,
    load_ratio,
    uncounted_reason,
)
from runtime.ort.component import open_component
from runtime.ort.router_outputs import Router, find_routers, logits_outputs
from runtime.pipeline import Pipeline
from runtime.request import check_request
from runtime.serve.batch import usage
from tests.tiny.grouped import differing, feed_of, load_transformer

DEFAULT = Path(__file__).resolve().parents[3] / "runtime" / "default"


def counted_by_torch(model: Any, inputs: dict[str, Any], top_k: int, kappa: int | None) -> Any:
    """FFN -> tokens by expert, of the sites that any sample passes; and the outputs."""
    import torch

    from d2m.distill import losses
    from d2m.model.block_group import set_kappa
    from d2m.model.surgery import sparse_ffns

    if kappa is not None:
        set_kappa(model, kappa)
    ffns = sparse_ffns(model)
    for ffn in ffns.values():
        ffn.record, ffn.top_k, ffn.last_logits = True, top_k, None
    with torch.no_grad():
        model(**inputs)
    return {
        name: losses.choices(ffn.last_logits.flatten(0, -2), top_k)[1].int().tolist()
        for name, ffn in ffns.items()
        if ffn.last_logits is not None
    }


@pytest.mark.parametrize("mode", ["graph", "blocks", "streamed"])
@pytest.mark.parametrize("name", ["grouped", "forecast"])
def test_the_counts_are_torchs(name: str, mode: str, request: pytest.FixtureRequest) -> None:
    """Samples that choose different blocks, one and two experts; drawing goes on as before."""
    model = load_transformer(request.getfixturevalue(f"tiny_{name}_dir"))
    bundle = open_bundle(request.getfixturevalue(f"tiny_{name}_bundle"))
    inputs = differing(model)
    feed = feed_of(model, inputs)
    options = {"offload": "block"} if mode == "streamed" else {"mode": mode}
    executor = open_component(bundle, "transformer", threads=1, **options)
    before = executor(feed, 2, 1)["sample"]
    tapped = CountingBlocks(executor)
    for top_k, kappa in ((2, 1), (1, 2), (2, 3)):
        tapped.counts = {}
        sample = tapped(feed, top_k, kappa)["sample"]
        found = {site: counts.tolist() for site, counts in tapped.counts.items()}
        assert found == counted_by_torch(model, inputs, top_k, kappa)
        assert sum(map(sum, found.values())) > 0
        np.testing.assert_allclose(sample, executor(feed, top_k, kappa)["sample"], atol=1e-4)
    np.testing.assert_array_equal(executor(feed, 2, 1)["sample"], before)


def test_a_tail_adds_outputs_and_nothing_else() -> None:
    onnx = pytest.importorskip("onnx")
    data = (DEFAULT / "blocks/transformer/double.k2.onnx").read_bytes()
    taps = find_routers(data)
    assert [tap.site for tap in taps] == ["ff", "ff_context"]
    before = onnx.load_model_from_string(data)
    after = onnx.load_model_from_string(data + logits_outputs(taps))
    added = [output.name for output in after.graph.output][len(before.graph.output) :]
    assert added == [tap.logits for tap in taps]
    del after.graph.output[len(before.graph.output) :]
    assert after == before
    without = find_routers((DEFAULT / "vae_decoder.onnx").read_bytes())
    assert logits_outputs([]) == b"" == logits_outputs(without)
    long = Router("ff", "x" * 300)  # lengths of more than seven bits
    assert onnx.load_model_from_string(logits_outputs([long])).graph.output[0].name == long.logits


@given(place=st.integers(0, 20_000), changed=st.binary(max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_damaged_graph_is_refused_or_read(place: int, changed: bytes) -> None:
    data = (DEFAULT / "blocks/transformer/double.k2.onnx").read_bytes()
    with contextlib.suppress(ValueError):
        assert all(tap.logits for tap in find_routers(data[:place] + changed + data[place + 8 :]))
    with contextlib.suppress(ValueError):
        find_routers(changed)


def test_choices_go_to_the_lowest_on_ties() -> None:
    logits = np.array([[1.0, 1.0, 1.0, 0.0], [0.0, 2.0, 2.0, 3.0]], np.float32)
    assert choices(logits, 2).tolist() == [1, 2, 0, 1]
    assert choices(logits, 4).tolist() == [2, 2, 2, 2]
    assert load_ratio(np.array([3, 3, 3])) == 1 and load_ratio(np.array([0, 6, 0])) == 3
    assert load_ratio(np.zeros(3, np.int64)) == 0


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(None, "ort", threads=1)


def test_an_image_is_the_same_where_experts_are_counted(pipeline: Pipeline) -> None:
    meter = Meter(pipeline)
    meter.start()
    assert meter.reason is None and not meter.counts
    prompts = ["a photo of a red circle", "a"]
    watched, sampler = meter.sampled_pipeline()
    images = watched(prompts, steps=3, seed=5)
    meter.add_batch(sampler.step, 1.0)
    again = pipeline(prompts, steps=3, seed=5)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in again]
    assert sampler.seen == 3 and meter.steps == 1
    # One image of 16 tokens and as many of text, two experts each, in every block that runs.
    request = check_request(pipeline.manifest, "a", steps=1)
    blocks = usage(pipeline.manifest, request)["blocks"]
    assert 0 < blocks < len(meter.counts) <= 2 * blocks  # double blocks have two FFNs
    assert sum(int(counts.sum()) for counts in meter.counts.values()) == 2 * 32 * blocks


def test_counting_takes_its_share_of_the_time_and_no_more(pipeline: Pipeline) -> None:
    meter = Meter(pipeline, share=0.01)
    meter.start()
    watched, sampler = meter.sampled_pipeline()
    watched("a", steps=1)
    cost: list[float] = []

    def count(step: Any) -> float:  # a clock of our own: 20 ms a step
        meter.seconds += 0.02
        meter.steps += 1
        cost.append(meter.generating)
        return 0.02

    meter.count = count  # type: ignore[method-assign]
    for _ in range(2000):
        meter.add_batch(sampler.step, 0.05)
    assert meter.seconds / meter.generating == pytest.approx(0.01, abs=0.003)
    assert len({round(b - a, 2) for a, b in zip(cost, cost[1:])}) > 3  # not in step


def test_every_step_is_as_likely(pipeline: Pipeline) -> None:
    """Of 8 steps each within 5 standard deviations of its share; steps without choice never."""
    component = pipeline.bundle.component("transformer")
    seen = np.zeros(8, int)
    for _ in range(2000):
        sampler = Sampler(component)
        for step in range(8):
            array = np.full((3, 1), step)
            sampler({"hidden_states": array}, 0 if step == 7 else 2, None)
        assert sampler.step is not None and sampler.step[0]["hidden_states"].shape == (1, 1)
        seen[int(sampler.step[0]["hidden_states"][0, 0])] += 1
    assert seen[7] == 0 and np.abs(seen[:7] - 2000 / 7).max() < 5 * np.sqrt(2000 / 7)


def test_where_nothing_is_counted_it_is_said(pipeline: Pipeline) -> None:
    for changes, reason in (
        ({"manifest": {**pipeline.manifest, "top_k_choices": []}}, "no experts"),
        ({"backend": "trt-rtx"}, "not on trt-rtx"),
    ):
        other = copy.copy(pipeline)
        vars(other).update(changes)
        assert uncounted_reason(other) == reason
    assert uncounted_reason(pipeline) is None


def test_a_failure_ends_the_counting_and_not_the_drawing(pipeline: Pipeline) -> None:
    meter = Meter(pipeline)
    meter.start()
    broken: Step = {"hidden_states": np.zeros((1, 2, 3), np.float32)}, 2, None
    meter.add_batch(broken, 1e9)
    assert meter.reason == "failed: ValueError"
    _, sampler = meter.sampled_pipeline()
    meter.add_batch(sampler.step or broken, 1e9)  # not tried again
    assert meter.steps == 0 and not meter.counts
