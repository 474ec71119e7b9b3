"""Step caching: what it says of texts, and what executors make of it against a reference.

The reference walks a component's program sample by sample, one block after the other, and writes
the formulas out in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.block_groups import blocks_of, first_calls, per_sample, sections
from runtime.bundle.directory import Bundle, open_bundle
from runtime.image import settings_of
from runtime.ort.component import open_component
from runtime.pipeline import Pipeline
from runtime.program.step_cache import LEAST, StepCache, read_method
from runtime.sampling import denoise, encode, noise_levels, prepare_latents
from tests.cases.executor_inputs import inputs

LEVELS = (1.0, 0.93, 0.81, 0.66, 0.5, 0.31, 0.1)  # not evenly spaced
METHODS = (
    "first-block:0.2",
    "interval:2",
    "taylor:first-block:0.2:1",
    "taylor:interval:2:2",
    "taylor:interval:3",
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "none"),
        ("none", "none"),
        ("first-block:0.10", "first-block:0.1"),
        ("first-block:.5", "first-block:0.5"),
        ("interval:3", "interval:3"),
        ("taylor:interval:3", "taylor:interval:3:1"),
        ("taylor:first-block:0.2:2", "taylor:first-block:0.2:2"),
    ],
)
def test_a_text_has_one_spelling(text: str | None, expected: str) -> None:
    method = read_method(text, 20)
    assert method.text == expected and read_method(method.text, 20) == method


@pytest.mark.parametrize(
    "text",
    ["", "first-block", "first-block:-1", "first-block:0.1:2", "interval:0", "interval:2000"]
    + ["taylor:2", "taylor:interval:2:9", "first-block:1e3", "first-block:101", 3, "x" * 10_000],
)
def test_other_texts_are_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"^cache is .* expected") as error:
        read_method(text, 20)
    assert len(str(error.value)) < 400


def test_auto_is_off_where_steps_are_few() -> None:
    assert not read_method("auto", LEAST - 1).skips and read_method("auto", LEAST).skips
    assert not read_method("first-block:0", 50).skips and not read_method("interval:1", 50).skips


def test_sections_end_at_cuts_and_at_groups() -> None:
    group = {"calls": [2, 3], "type": "router", "prefix": "", "alpha": 0.5}
    component = {"program": [{}] * 6, "groups": {"a": group}}
    assert list(sections(component, 1, {}, (1, 2, 5))) == [
        (0, 1, None),
        (1, 2, None),
        (2, 2, "a"),
        (2, 5, None),
        (5, 6, None),
    ]


# ---------------------------------------------------------------- executors against the reference


def steps_of(bundle: Bundle, rows: int = 3) -> list[dict[str, np.ndarray]]:
    """A batch's inputs in every step: image and noise level drift, from row to row less."""
    first, second = (inputs(bundle, "transformer", seed, batch=rows) for seed in (0, 1))
    steps = []
    for level in LEVELS:
        feed = dict(first)
        # A random embedding of the noise level turns at once.
        for name, share in (("hidden_states", 1.0), ("timestep", 1e-4)):
            drift = np.float32([1.0, 0.3, 0.1][:rows]) * np.float32(share * (1 - level))
            drift = drift.reshape(-1, *[1] * (first[name].ndim - 1))
            feed[name] = first[name] + drift * second[name]
        steps.append(feed)
    return steps


def reference(
    executor: Any, feeds: list[dict[str, np.ndarray]], text: str, top_k: int, kappa: int | None
) -> tuple[list[np.ndarray], list[bool]]:
    """Outputs of one sample step by step, and which steps were left out."""
    component, method = executor.component, read_method(text, 50)
    blocks = blocks_of(component)
    groups = {group["calls"][0]: group for group in component.get("groups", {}).values()}
    head = blocks[0]
    if method.threshold is not None:
        own = [group["calls"] for group in groups.values() if blocks[0] in group["calls"]]
        head = (own[0][-1] if own else blocks[0]) + 1
    known: list[tuple[float, np.ndarray]] = []
    last: np.ndarray | None = None
    outputs, skipped = [], []
    for step, (feed, level) in enumerate(zip(feeds, LEVELS, strict=True)):
        env: dict[str, np.ndarray] = dict(feed)
        chosen: dict[int, bool] = {}
        skip = False
        for index, call in enumerate(component["program"]):
            if index == blocks[0]:
                before = env["hidden_states"].astype(np.float64)
            if index == head:
                entry = env["hidden_states"].astype(np.float64)
                residual = entry - before
                if method.threshold is None:
                    skip = step % method.interval != 0
                elif last is not None:
                    skip = np.abs(residual - last).mean() < method.threshold * np.abs(last).mean()
                last = last if skip else residual
            if index == blocks[-1] + 1:
                if skip:
                    points = known[-method.order - 1 :]
                    place = np.array([at for at, _ in points])
                    values = np.stack([value.ravel() for _, value in points])
                    fitted = np.polyfit(place, values, len(points) - 1)
                    powers = level ** np.arange(len(points) - 1, -1, -1)
                    added = (powers @ fitted).reshape(entry.shape)
                    env["hidden_states"] = (entry + added).astype(np.float32)
                else:
                    known.append((level, env["hidden_states"] - entry))
            if skip and head <= index <= blocks[-1]:
                continue
            if kappa is not None and index in groups:
                group = groups[index]
                row = component["types"][group["type"]]
                given = {name: env[name] for name in row["inputs"]}
                (logits,) = executor.block(group["type"], group["prefix"], given).values()
                start = int(first_calls(logits, kappa)[0])
                for offset, each in enumerate(group["calls"]):
                    chosen[each] = start <= offset < start + kappa
            if chosen.get(index, True):
                row = component["types"][call["type"]]
                given = {name: env[name] for name in row["inputs"]}
                env |= executor.block(call["type"], call["prefix"], given, top_k)
        outputs.append(env["sample"])
        skipped.append(skip)
    return outputs, skipped


def compare(executor: Any, blocks: Any, text: str, kappa: int | None) -> np.ndarray:
    """A batch through `executor` and every sample alone through the reference; what was skipped."""
    feeds, component = steps_of(blocks.bundle), blocks.component
    cache = StepCache(read_method(text, 50), component)
    found = []
    for feed, level in zip(feeds, LEVELS, strict=True):
        cache.begin(level)
        found.append(executor(feed, 2, kappa, None, cache)["sample"])
    counts = []
    for row in range(3):
        alone = [
            {n: v[row : row + 1] if per_sample(component, n) else v for n, v in feed.items()}
            for feed in feeds
        ]
        expected, skipped = reference(blocks, alone, text, 2, kappa)
        for step, array in enumerate(expected):
            np.testing.assert_allclose(found[step][row : row + 1], array, rtol=1e-3, atol=2e-4)
        counts.append(sum(skipped))
    assert cache.skipped.tolist() == counts and sum(counts) > 0
    return cache.skipped


@pytest.mark.parametrize("text", METHODS)
def test_a_batch_is_what_each_sample_is_by_the_formulas(tiny_bundle: Path, text: str) -> None:
    blocks = open_component(open_bundle(tiny_bundle), "transformer", threads=1, mode="blocks")
    counts = compare(blocks, blocks, text, None)
    if "first-block" in text:  # the quick row is computed more often than the slow ones
        assert counts[0] < counts[2] == len(LEVELS) - 1


@pytest.mark.parametrize("text", ["first-block:0.2", "taylor:interval:2"])
def test_with_groups_of_blocks(tiny_grouped_bundle: Path, tmp_path: Path, text: str) -> None:
    """Blocks in ONNX Runtime and plans: which samples run a block is both methods' choice."""
    from tests.runtime.trt.test_component_groups import plans_of
    from tests.stand_ins.device import bundle_with_plans

    bundle = bundle_with_plans(tiny_grouped_bundle, tmp_path / "plans")
    blocks = open_component(bundle, "transformer", threads=1, mode="blocks")
    for executor in (blocks, plans_of(bundle, graphs=True)):
        compare(executor, blocks, text, 1)


def test_streamed_weights_are_those_that_will_run(tiny_grouped_bundle: Path) -> None:
    bundle = open_bundle(tiny_grouped_bundle)
    made = [open_component(bundle, "transformer", threads=1, mode="blocks")]
    made.append(open_component(bundle, "transformer", threads=1, offload="block"))
    compare(made[1], made[0], "first-block:0.2", 2)


# ---------------------------------------------------------------- images


def test_nothing_skipped_is_bit_equal_and_no_state_stays(tiny_bundle: Path) -> None:
    """A threshold of 0, and one below every change, which runs through all of the caching."""
    whole = Pipeline(tiny_bundle, "ort", threads=1)
    blocks = Pipeline(tiny_bundle, "ort", threads=1, mode="blocks", max_batch=1)
    prompts, asked = ["a red circle", "two blue squares"], {"steps": 5, "output_type": "np"}
    plain = whole(prompts, **asked)
    assert np.array_equal(plain, whole(prompts, cache="first-block:0", **asked))
    exact = blocks(prompts, **asked)
    assert np.array_equal(exact, blocks(prompts, cache="first-block:0.0000001", **asked))
    cached = blocks(prompts, cache="interval:2", **asked)  # one after the other
    assert np.array_equal(cached[1:], blocks(prompts[1:], cache="interval:2", **asked))
    assert not np.array_equal(cached, exact)
    images = whole(prompts, cache="taylor:interval:2", steps=5, n=2)
    assert [settings_of(image)["steps_skipped"] for image in images] == [2.0] * 4
    assert settings_of(images[0])["cache"] == "taylor:interval:2:1"
    with pytest.raises(ValueError, match=r"cache is 'often', expected none"):
        whole(prompts, cache="often")


def test_both_rows_of_a_guided_image_have_a_state(tiny_guided_bundle: Path) -> None:
    """Prompt and negative prompt in one batch are what two passes with a cache each are."""
    model = Pipeline(tiny_guided_bundle, "ort", threads=1, mode="blocks")
    family, size, steps = model.family, (8, 8), 7
    method, component = read_method("first-block:0.4", steps), model.bundle.component("transformer")
    conditions, negative = encode(model, ["a red circle"]), encode(model, ["a black star"])
    noise = prepare_latents(model, [5], size)
    cache = StepCache(method, component)
    settings: dict[str, Any] = {"latent_size": size, "top_k": [None] * steps}
    settings |= {"guidance": 3.0, "conditions": conditions, "negative": negative}
    found = denoise(model, noise, **settings, cache=cache)
    assert cache.skipped.shape == (2,) and 0 < cache.skipped.sum() < 2 * steps

    levels = noise_levels(model, steps, size)
    advance = family.sampler(model.manifest["scheduler"], levels)
    times = family.timesteps(model.manifest["scheduler"], levels[:-1])
    passes = [(each, StepCache(method, component)) for each in (negative, conditions)]
    latents = noise
    for index, time in enumerate(times):
        samples = []
        for each, own in passes:
            own.begin(levels[index])
            feed = family.inputs(model.manifest, each, size, 3.0)
            feed |= {"timestep": np.full(1, time, np.float32)}
            feed |= {"hidden_states": family.tokens(latents, model.manifest["latents"])}
            (sample,) = model.execute("transformer", feed, None, None, None, own).values()
            samples.append(sample)
        sample = family.guide(np.concatenate(samples), 3.0)
        velocity = family.velocity(sample, model.manifest["latents"], size)
        latents = advance(index, latents, velocity)
    assert [int(own.skipped[0]) for _, own in passes] == cache.skipped.tolist()
    np.testing.assert_allclose(found, latents, rtol=1e-3, atol=1e-4)
