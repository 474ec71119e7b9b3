"""Batches: who shares one, that no byte depends on it, and what a failure or a cancel does."""

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("prometheus_client")
from runtime.measure.expert_load import Meter
from runtime.pipeline import Pipeline
from runtime.sampling import Cancelled
from runtime.serve.batch_invariance import MinBatches, find_min_batch, runs_whole_graph, sample
from runtime.serve.generate_threads import GenerateThreads
from runtime.serve.image_request import Limits, read_request
from runtime.serve.jobs import Full, Job, Jobs
from runtime.serve.metrics import Metrics


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(None, "ort", threads=1)


def job(pipeline: Pipeline, prompt: str, **fields: Any) -> Job:
    body = json.dumps({"prompt": prompt, "steps": 3, **fields}).encode()
    return Job(read_request(body, pipeline.manifest, Limits()))


TRIED: dict[int, MinBatches] = {}  # by pipeline: trying takes longer than the drawings here


def min_batches(pipeline: Pipeline) -> MinBatches:
    return TRIED.setdefault(id(pipeline.bundle), MinBatches(pipeline))


def drawn(pipeline: Pipeline, jobs: Sequence[Job], workers: int = 1) -> Metrics:
    """Draw what waits before the threads begin; returns their metrics."""
    metrics, queue = Metrics(), Jobs(100)
    for each in jobs:
        queue.put(each)
    drawing = GenerateThreads(Meter(pipeline), queue, min_batches(pipeline), metrics, workers)
    drawing.start()
    for each in jobs:
        if not each.cancelled.is_set():
            each.answer.exception(timeout=120)
    queue.close()
    drawing.join(60)
    assert not drawing.active
    return metrics


def value(metrics: Metrics, name: str) -> float:
    found = metrics.registry.get_sample_value(name)
    assert found is not None, name
    return found


ROWS: list[dict[str, Any]] = [
    {"prompt": "a photo of a red circle", "seed": 1},
    {"prompt": "two blue squares", "seed": 2, "n": 3},
    {"prompt": "a photo of a red circle", "seed": 3},
    {"prompt": "three yellow triangles above a square", "seed": 4},
]


def test_no_byte_depends_on_the_batch(pipeline: Pipeline) -> None:
    together = [job(pipeline, **row) for row in ROWS]
    metrics = drawn(pipeline, together)
    if min_batches(pipeline).of(together[0].request.arguments) is None:
        pytest.skip("here bits depend on the batch, so that requests share none")
    assert value(metrics, "d2m_batch_images_count") == 1  # six images, one batch
    assert value(metrics, "d2m_batch_images_sum") == 6 == value(metrics, "d2m_images_total")
    assert value(metrics, "d2m_steps_total") == 3
    assert value(metrics, "d2m_blocks_run_total") == 6 * 3 * 12  # groups leave six of 18 out
    for row, before in zip(ROWS, together, strict=True):
        alone = job(pipeline, **row)
        drawn(pipeline, [alone])
        assert alone.answer.result().images == before.answer.result().images
    first, third = (together[i].answer.result().images for i in (0, 2))
    assert first != third  # the same prompt, another seed


def test_other_knobs_are_another_batch(pipeline: Pipeline) -> None:
    jobs = [job(pipeline, "a", steps=steps, seed=1) for steps in (1, 2, 1)]
    metrics = drawn(pipeline, jobs)
    assert value(metrics, "d2m_batch_images_count") in (2, 3)
    assert value(metrics, "d2m_images_total") == 3
    assert jobs[0].answer.result().images == jobs[2].answer.result().images


def test_more_images_than_a_batch_holds(pipeline: Pipeline) -> None:
    small = Pipeline(pipeline.bundle, "ort", threads=1, max_batch=2)
    few, many = (job(pipeline, "a", n=5, seed=3, steps=2) for _ in range(2))
    drawn(small, [few])
    drawn(pipeline, [many])
    metrics = drawn(small, [job(pipeline, "a", n=5, seed=3, steps=2)])
    assert value(metrics, "d2m_steps_total") == 3 * 2
    assert few.answer.result().images == many.answer.result().images
    assert len(set(few.answer.result().images)) == 5


def test_the_floor_is_true_of_batches_that_it_did_not_try(pipeline: Pipeline) -> None:
    min_batch = find_min_batch(pipeline, (8, 8), 2)
    if min_batch is None:
        pytest.skip("here bits depend on the batch")
    first = sample(pipeline, (8, 8), 2, min_batch, 100)
    for size, turn in ((min_batch, 101), (5, 102), (8, 103)):
        assert np.array_equal(sample(pipeline, (8, 8), 2, size, turn), first)


def test_block_sessions_share_no_batch_where_their_bits_depend_on_it(pipeline: Pipeline) -> None:
    samples = [sample(pipeline, (8, 8), 4, 8, turn) for turn in range(5)]
    same = all(np.array_equal(samples[0], other) for other in samples)
    assert same or find_min_batch(pipeline, (8, 8), 4) is None


def test_groups_share_batches_in_the_whole_graph_alone(pipeline: Pipeline) -> None:
    """There a block runs for all rows or none; block sessions run it with those that chose it."""
    assert pipeline.bundle.component("transformer")["groups"]
    assert runs_whole_graph(pipeline, None) and runs_whole_graph(pipeline, 2)
    assert not runs_whole_graph(pipeline, 4)
    assert find_min_batch(pipeline, (8, 8), 4) is None


class Fragile(Pipeline):
    """Fails wherever the prompt is "bad"."""

    def __call__(self, prompt: str | Sequence[str], **arguments: Any) -> Any:
        if "bad" in prompt:
            raise ValueError("the prompt is bad.")
        return super().__call__(prompt, **arguments)


def test_a_failure_is_that_requests_alone(pipeline: Pipeline) -> None:
    fragile = Fragile(pipeline.bundle, "ort", threads=1)
    jobs = [job(pipeline, prompt, seed=1) for prompt in ("a", "bad", "b")]
    drawn(fragile, jobs)
    with pytest.raises(ValueError, match="the prompt is bad"):
        jobs[1].answer.result()
    for each in (jobs[0], jobs[2]):
        alone = job(pipeline, each.request.arguments.prompts[0], seed=1)
        drawn(pipeline, [alone])
        assert each.answer.result().images == alone.answer.result().images


def test_a_cancelled_job_costs_nothing_and_others_are_drawn(pipeline: Pipeline) -> None:
    jobs = [job(pipeline, "a", steps=2), job(pipeline, "b", steps=2)]
    jobs[0].cancelled.set()
    metrics = drawn(pipeline, jobs)
    assert value(metrics, "d2m_images_total") == 1
    assert jobs[1].answer.result().images and not jobs[0].answer.done()


def test_a_drawing_stops_once_nobody_wants_it(pipeline: Pipeline) -> None:
    metrics, queue = Metrics(), Jobs(4)
    each = job(pipeline, "a", steps=100)
    queue.put(each)
    drawing = GenerateThreads(Meter(pipeline), queue, min_batches(pipeline), metrics, 1)
    drawing.start()
    done = threading.Event()
    each.answer.add_done_callback(lambda _: done.set())
    while value(metrics, "d2m_steps_total") < 2:
        assert not done.wait(0.01)
    queue.remove(each)
    with pytest.raises(Cancelled):
        each.answer.result(timeout=60)
    assert value(metrics, "d2m_steps_total") < 100
    queue.close()
    drawing.join(10)


def test_several_workers_draw_what_one_draws(pipeline: Pipeline) -> None:
    def jobs() -> list[Job]:
        return [job(pipeline, "a", seed=seed, steps=2 + seed % 2) for seed in range(6)]

    one, three = jobs(), jobs()
    drawn(pipeline, one)
    drawn(pipeline, three, workers=3)
    pngs = [[each.answer.result().images for each in found] for found in (one, three)]
    assert pngs[0] == pngs[1]


def test_the_queue(pipeline: Pipeline) -> None:
    queue = Jobs(3)
    first, other, third = (job(pipeline, "a", steps=steps) for steps in (1, 2, 1))
    for each in (first, other, third):
        queue.put(each)
    with pytest.raises(Full):
        queue.put(job(pipeline, "b"))
    assert len(queue) == queue.images == 3 and queue.first() is first
    assert queue.take_similar(first.request.key, 0) == []
    assert queue.take_similar(first.request.key, 1) == [third]
    queue.remove(other)
    assert len(queue) == 0 and other.cancelled.is_set()
    queue.put(other)
    assert queue.close() == [other] and queue.first() is None
    with pytest.raises(Full):
        queue.put(first)
