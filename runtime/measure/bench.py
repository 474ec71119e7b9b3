"""`d2m bench`: cold start, images, steps, blocks and memory of a bundle, alone or against another.

The other is meant to be the dense model exported the same way. Both take turns, each of them first
in every second turn, so that a busy machine slows both; ratios are medians over pairs, the other
bundle's seconds by this one's: above 1 this one is faster.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from runtime.images.given import example_images
from runtime.measure.bench_facts import differences, facts, machine, memory
from runtime.measure.block_times import BlockTimer
from runtime.measure.block_times import table as block_table
from runtime.measure.cold_start import time_cold_start
from runtime.opened import default_bundle
from runtime.pipeline import Pipeline
from runtime.request import check_request
from runtime.sampling import request_inputs

Progress = Callable[[str, int, int], None]
Rows = dict[str, list[dict[str, float | None]]]
PROMPT = "a red circle above a blue square"
NAMES = ("bundle", "vs")


def bench(
    bundle: str | os.PathLike[str] | None = None,
    vs: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    runs: int = 5,
    batches: Sequence[int] = (1,),
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    top_k: int | None = None,
    kappa: int | None = None,
    cache: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure `bundle` (None: the one that ships with d2m), and `vs` beside it.

    Args:
        runs: cold starts, and turns of every other measurement after one that warms up; from 1.
        batches: images generated at a time.
        steps, height, width: the bundle's own by default, for `vs` too; guidance is the bundle's.
        top_k, kappa: of `bundle` alone; a dense one has none.
        cache: step caching, of `bundle` alone; blocks are timed one by one without it.

    Returns settings, machine, and for "bundle" and "vs" facts, cold (seconds, MiB), images (by
    batch), blocks (see runtime.measure.block_times) and memory; with `vs` ratios, and what else
    than the method differs between the two. Raises what opening and generating raise, with one
    sentence.
    """
    if runs < 1:
        raise ValueError(f"--runs is {runs}, expected 1 or more")
    if not batches or min(batches) < 1:
        raise ValueError(f"--batch is {','.join(map(str, batches))}, expected numbers from 1")
    paths = dict(zip(NAMES, (bundle or default_bundle(), *((vs,) if vs else ()))))
    report = progress or (lambda phase, done, total: None)
    opened = {
        name: Pipeline(path, backend, threads=threads, max_batch=max(batches))
        for name, path in paths.items()
    }
    defaults = opened["bundle"].manifest["defaults"]
    common = {
        "steps": steps or defaults["steps"],
        "guidance": defaults["guidance"],
        "height": height or defaults["height"],
        "width": width or defaults["width"],
    }
    own = {"top_k": top_k, "kappa": kappa, "cache": cache}
    knobs: dict[str, dict[str, Any]] = {"bundle": common | own, "vs": common}
    for name, pipeline in opened.items():  # an error for what cannot run, before the long part
        pipeline.warm()
        pipeline(PROMPT, seed=0, **knobs[name] | {"steps": 1}, **example_images(pipeline.manifest))

    def cold_turn(name: str, turn: int) -> dict[str, float | None]:
        settings = {"backend": backend, "threads": threads, "prompt": PROMPT, "knobs": knobs[name]}
        return time_cold_start(paths[name], settings)

    colds = take_turns(paths, runs, cold_turn, report, "cold")
    images = {}
    for batch in batches:

        def image_turn(name: str, turn: int, batch: int = batch) -> dict[str, float | None]:
            return time_images(opened[name], batch, turn, knobs[name])

        phase = f"batch {batch}"
        images[batch] = take_turns(paths, runs, image_turn, report, phase, warm_up=True)
    timers = {
        name: BlockTimer(opened[name], first_inputs(opened[name], knobs[name]), k)
        for name, k in zip(paths, (top_k, None))
    }
    # Blocks one by one: all of a turn's times are kept, for `table` takes medians over calls too.
    blocks: dict[str, list[dict[str, list[float]]]] = {name: [] for name in paths}

    def block_turn(name: str, turn: int) -> dict[str, float | None]:
        seconds = timers[name].turn()
        if turn >= 0:
            blocks[name].append(seconds)
        return {}

    take_turns(paths, runs, block_turn, report, "blocks", warm_up=True)

    answer: dict[str, Any] = {
        "machine": machine(),
        "settings": {"runs": runs, "prompt": PROMPT, **common, **own},
    }
    for name, pipeline in opened.items():
        kept_blocks = kappa if name == "bundle" and kappa else pipeline.manifest.get("kappa")
        answer[name] = {
            **facts(pipeline),
            "cold": medians(colds[name]),
            "images": {str(batch): medians(rows[name]) for batch, rows in images.items()},
            "blocks": block_table(pipeline, blocks[name], kept_blocks),
            "memory": memory(pipeline, colds[name]),
        }
    if "vs" in opened:
        answer["ratios"] = {
            "cold": ratios(colds),
            "images": {str(batch): ratios(rows) for batch, rows in images.items()},
            "blocks": block_ratios(blocks),
        }
        answer["differences"] = differences(opened)
    return answer


def take_turns(
    names: Iterable[str],
    runs: int,
    measure: Callable[[str, int], dict[str, float | None]],
    report: Progress,
    phase: str,
    warm_up: bool = False,
) -> Rows:
    """`measure(name, turn)` for every name in every turn; turn -1, if any, is thrown away."""
    order = list(names)
    rows: Rows = {name: [] for name in order}
    report(phase, 0, runs)
    for turn in range(-1 if warm_up else 0, runs):
        for name in order if turn % 2 == 0 else reversed(order):
            row = measure(name, turn)
            if turn >= 0:
                rows[name].append(row)
        report(phase, turn + 1, runs)
    return rows


def time_images(
    pipeline: Pipeline, batch: int, turn: int, knobs: dict[str, Any]
) -> dict[str, float | None]:
    """One call: seconds an image, and seconds a step of the whole batch."""
    marks: list[float] = []

    def note(phase: str, done: int, total: int) -> None:
        if phase == "denoise":
            marks.append(time.perf_counter())

    start = time.perf_counter()
    given = example_images(pipeline.manifest)
    pipeline(PROMPT, seed=turn + 1, n=batch, progress=note, **knobs, **given)
    total = time.perf_counter() - start
    return {"image_s": total / batch, "step_s": (marks[-1] - marks[0]) / (len(marks) - 1)}


def first_inputs(pipeline: Pipeline, knobs: dict[str, Any]) -> dict[str, Any]:
    """The transformer's inputs in the first step of one image, as its executor takes them."""
    given = example_images(pipeline.manifest)
    return request_inputs(pipeline, check_request(pipeline.manifest, PROMPT, **knobs, **given))[0]


def medians(rows: list[dict[str, float | None]]) -> dict[str, Any]:
    """Median of every figure, range of those of images and steps, and steps a second."""
    answer: dict[str, Any] = {}
    for figure in rows[0]:
        values = [value for row in rows if (value := row[figure]) is not None]
        answer[figure] = round(statistics.median(values), 5) if values else None
        if figure in ("first_image_s", "image_s", "step_s"):
            answer[f"{figure}_range"] = [round(min(values), 5), round(max(values), 5)]
    if answer.get("step_s"):
        answer["steps_per_s"] = round(1 / answer["step_s"], 2)
    return answer


def ratios(rows: Rows) -> dict[str, Any]:
    """vs by bundle, turn by turn: median, lowest and highest."""
    answer = {}
    for figure in rows["bundle"][0]:
        pairs = [
            other / ours
            for row, against in zip(rows["bundle"], rows["vs"], strict=True)
            if (ours := row[figure]) and (other := against[figure])
        ]
        if pairs:
            answer[figure.removesuffix("_s").removesuffix("_mib")] = spread(pairs)
    return answer


def block_ratios(blocks: dict[str, list[dict[str, list[float]]]]) -> dict[str, Any]:
    """The same for block types that both have, by the median call of a turn."""
    answer = {}
    for kind in blocks["bundle"][0]:
        if kind in blocks["vs"][0]:
            answer[kind] = spread(
                statistics.median(other[kind]) / statistics.median(ours[kind])
                for ours, other in zip(blocks["bundle"], blocks["vs"], strict=True)
            )
    return answer


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median and range."""
    found = sorted(values)
    return {
        "median": round(statistics.median(found), 3),
        "range": [round(found[0], 3), round(found[-1], 3)],
    }
