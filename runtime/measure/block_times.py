"""Where a step's time goes: every block of a transformer timed by itself, on any backend.

A block is run alone through its executor's `block`, with the tensors that a real step hands it, so
its time includes what a call costs by itself (on a GPU the copies to and from the device, which a
whole step does not have). Read shares and ratios; bench.py measures whole steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtime.cuda.arena import byte_size
from runtime.program.executor import run_program

if TYPE_CHECKING:
    import numpy as np

    from runtime.pipeline import Pipeline


class BlockTimer:
    """A pipeline's transformer, run block by block."""

    def __init__(self, pipeline: Pipeline, inputs: Mapping[str, np.ndarray], top_k: int | None):
        """`inputs`: the transformer's, as numpy arrays in its dtypes."""
        executor: Any = pipeline.executor("transformer")
        if not hasattr(executor, "block"):  # a whole graph; its blocks share its bundle
            executor = executor.blocks()
        self.block = executor.block
        self.component = pipeline.bundle.component("transformer")
        self.inputs = dict(inputs)
        self.top_k = pipeline.manifest.get("top_k") if top_k is None else top_k

    def turn(self) -> dict[str, list[float]]:
        """One run of the whole program; seconds of every call and every router, by type.

        All blocks run, those of groups too: what a step leaves out is counted, not measured.
        """
        seconds: dict[str, list[float]] = {}
        env, types = dict(self.inputs), self.component["types"]

        def timed(kind: str, prefix: str, top_k: int | None) -> list[np.ndarray]:
            """One block on the tensors so far, its time noted under its type."""
            inputs = {name: env[name] for name in types[kind]["inputs"]}
            start = time.perf_counter()
            outputs = self.block(kind, prefix, inputs, top_k)
            seconds.setdefault(kind, []).append(time.perf_counter() - start)
            env.update(outputs)
            return list(outputs.values())

        def call(
            index: int, kind: str, key: str, prefix: str, values: list[np.ndarray]
        ) -> list[np.ndarray]:
            env.update(zip(types[kind]["inputs"], values, strict=True))
            for group in self.component.get("groups", {}).values():
                if group["calls"][0] == index:
                    timed(group["type"], group["prefix"], None)
            return timed(kind, prefix, self.top_k)

        run_program(self.component, self.inputs, self.top_k, call)
        return seconds


def table(
    pipeline: Pipeline, turns: list[dict[str, list[float]]], kappa: int | None
) -> list[dict[str, Any]]:
    """Rows by block type, in the program's order: how many there are, run in a step, and cost.

    call_ms: median over calls and turns. step_ms: calls that a step runs times that. share: of the
    sum of step_ms. weights_mib: what one call reads.
    """
    component = pipeline.bundle.component("transformer")
    program = [call["type"] for call in component["program"]]
    counts = {kind: program.count(kind) for kind in dict.fromkeys(program)}
    left: dict[str, int] = {}
    for group in component.get("groups", {}).values():
        size = len(group["calls"])
        counts[group["type"]] = counts.get(group["type"], 0) + 1
        for index in group["calls"][: size - min(size, kappa or size)]:
            left[program[index]] = left.get(program[index], 0) + 1
    rows: list[dict[str, Any]] = []
    for kind, count in counts.items():
        median = statistics.median(second for turn in turns for second in turn[kind])
        row = component["types"][kind]
        run = count - left.get(kind, 0)
        weights = (byte_size(each["shape"], each["dtype"]) for each in row["weights"].values())
        rows.append(
            {
                "type": kind,
                "body": row.get("body"),
                "calls": count,
                "run": run,
                "call_ms": round(1000 * median, 4),
                "step_ms": round(1000 * median * run, 3),
                "weights_mib": round(sum(weights) / (1 << 20), 3),
            }
        )
    whole = sum(row["step_ms"] for row in rows) or 1.0
    return [row | {"share": round(row["step_ms"] / whole, 4)} for row in rows]
