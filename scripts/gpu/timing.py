"""Time of a piece of GPU work: rotated buffers, CUDA graph replay, medians of event times.

A function timed on one set of inputs measures the cache: callers hand over several functions that
do the same on tensors of their own, and these take turns. What cannot be captured in a graph (a
loop over experts waits for its counts) is timed launch by launch, and the answer says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Work = Callable[[], Any]


def backend(device: torch.device) -> str:
    """What torch.compile compiles with: on a CPU only the tracing is exercised."""
    return "inductor" if device.type == "cuda" else "eager"


def rotations(bytes_each: int, device: torch.device, most: int = 8) -> int:
    """How many sets of tensors make the cache useless: four times its size together."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(most, -(-4 * cache // max(bytes_each, 1))))


def measure(
    works: Sequence[Work], device: torch.device, *, seconds: float = 1.0, graph: bool = True
) -> dict[str, Any]:
    """Median time of one call: {"ms", "low", "high" (deciles), "runs", "graph", "why"}.

    Runs for about `seconds` after three warm-ups of every work, at least 5 and at most 200 times.
    """
    if device.type != "cuda":
        return _on_host(works, seconds)
    for _ in range(3):
        for work in works:
            work()
    torch.cuda.synchronize()
    replays, why = _captured(works) if graph else ([], "not asked for")
    calls = [item.replay for item in replays] or list(works)
    start = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - start, 1e-5)
    runs = max(5, min(200, int(seconds / once)))
    events = []
    for run in range(runs):
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        calls[run % len(calls)]()
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize()
    times = [first.elapsed_time(last) for first, last in events]
    del replays
    return {**_summary(times), "graph": not why, **({"why": why} if why else {})}


def _captured(works: Sequence[Work]) -> tuple[list[Any], str]:
    """A graph for every work, or no graph and the reason."""
    graphs = []
    try:
        for work in works:
            item = torch.cuda.CUDAGraph()
            with torch.cuda.graph(item):
                work()
            item.replay()
            graphs.append(item)
        torch.cuda.synchronize()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return [], " ".join(str(error).split())[:160] or type(error).__name__
    return graphs, ""


def _on_host(works: Sequence[Work], seconds: float) -> dict[str, Any]:
    works[0]()
    times: list[float] = []
    began = time.perf_counter()
    while not times or (len(times) < 50 and time.perf_counter() - began < seconds):
        start = time.perf_counter()
        works[len(times) % len(works)]()
        times.append(1000 * (time.perf_counter() - start))
    return {**_summary(times), "graph": False, "why": "no GPU"}


def _summary(times: list[float]) -> dict[str, Any]:
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return {
        "ms": round(statistics.median(ordered), 5),
        "low": round(ordered[tenth], 5),
        "high": round(ordered[-1 - tenth], 5),
        "runs": len(ordered),
    }


def peak(device: torch.device, work: Work) -> int | None:
    """Most bytes that were allocated at once while `work` ran, parameters included."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated(device))
