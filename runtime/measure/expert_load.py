"""How tokens fall on experts: a step of a generation runs once more, its routers' choices counted.

Generating itself is not touched: an image has the same bits whether or not anything is counted. The
step goes through block graphs with their routers' logits as outputs (runtime.ort.router_outputs).
Where blocks run in sessions of their own, the weights are those; beside a whole graph, which holds
its weights packed, they are streamed through two rooms of a block's size
(runtime.ort.block_weights).

Of one image of a batch at a time, and as often as a share of the time spent on generating allows:
what counting costs is bounded, whatever a step takes.
"""

from __future__ import annotations

import copy
import logging
import random
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.bundle.block_groups import per_sample
from runtime.images.given import example_images
from runtime.ort.blocks import Blocks
from runtime.ort.router_outputs import Router, find_routers, logits_outputs

if TYPE_CHECKING:
    import onnxruntime

    from runtime.pipeline import Pipeline
    from runtime.program.executor import Executor

log = logging.getLogger("runtime")
SHARE = 0.01  # of the time spent on generating
Step = tuple[dict[str, np.ndarray], int | None, int | None]  # inputs, top_k, kappa


class CountingBlocks(Blocks):
    """Blocks that count: `counts` holds tokens by FFN, [E], over all calls."""

    def __init__(self, executor: Executor) -> None:
        """With an executor's weights, place and lock, or beside a whole graph on the CPU."""
        other: Any = executor
        blocks = executor if isinstance(executor, Blocks) else None
        super().__init__(other.bundle, "transformer", other.threads, offload="block", share=blocks)
        # Beside a graph that has an arena these sessions have one too: what every call takes from
        # the heap and gives back leaves holes there (1 MB in 150 steps of the shipped bundle).
        self.arena = self.arena or blocks is None
        self.counts: dict[str, np.ndarray] = {}
        self._routers: dict[str, list[Router]] = {}
        self._blocks = blocks

    def session(self, graph: str) -> onnxruntime.InferenceSession:
        """See Blocks; graphs without routers are the sessions that generate, where there are."""
        if self._blocks is not None and not self.routers(graph):
            return self._blocks.session(graph)
        return super().session(graph)

    def routers(self, graph: str) -> list[Router]:
        """A graph's routers."""
        if graph not in self._routers:
            self._routers[graph] = find_routers(self.bundle.read(graph))
        return self._routers[graph]

    def extra_outputs(self, graph: str) -> bytes:
        """See Blocks."""
        return logits_outputs(self.routers(graph))

    def expected(self, kind: str, graph: str) -> dict[str, Any]:
        """See Blocks; with the logits."""
        row = super().expected(kind, graph)
        return {**row, "outputs": [*row["outputs"], *(each.logits for each in self.routers(graph))]}

    def call(
        self, index: int, kind: str, key: str, prefix: str, inputs: list[Any]
    ) -> list[onnxruntime.OrtValue]:
        """See Blocks; the logits are counted and left out."""
        outputs = super().call(index, kind, key, prefix, inputs)
        row = self.component["types"][kind]
        own = len(row["outputs"])
        for router, value in zip(self.routers(row["graphs"][key]), outputs[own:], strict=True):
            counts = choices(self.place.fetch(value), int(key))
            site = f"{prefix}{router.site}"
            self.counts[site] = self.counts.get(site, 0) + counts
        return outputs[:own]


def choices(logits: np.ndarray, top_k: int) -> np.ndarray:
    """[T, E] -> how many tokens have each expert among their top_k, [E]; the lowest on ties."""
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    counts: np.ndarray = np.bincount(chosen.ravel(), minlength=logits.shape[1])
    return counts


def load_ratio(counts: np.ndarray) -> float:
    """Tokens of the busiest expert over the mean: 1 where all have as many, E where it has all."""
    return float(counts.max() * len(counts) / max(1, counts.sum()))


class Meter:
    """Counts for one pipeline, sampled. `counts`: tokens by FFN and expert, of `steps` steps.

    `reason` says why nothing is counted, None where something is. Threads may share a meter.
    """

    def __init__(self, pipeline: Pipeline, share: float = SHARE) -> None:
        self.pipeline, self.share = pipeline, share
        self.counts: dict[str, np.ndarray] = {}
        self.steps = 0
        self.seconds = self.generating = 0.0  # spent on counting, and on generating
        self.reason: str | None = "not begun"
        self._due = 0.0  # seconds of generating
        self._counting: CountingBlocks | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Generate an image of one step and open the graphs with it; it does not count."""
        self.reason = uncounted_reason(self.pipeline)
        pipeline, sampler = self.sampled_pipeline()
        pipeline("", steps=1, **example_images(pipeline.manifest))
        if self.reason is None and sampler.step is not None:
            self.count(sampler.step)
            self.counts, self.steps, self.seconds = {}, 0, 0.0

    def sampled_pipeline(self) -> tuple[Pipeline, Sampler]:
        """The pipeline for one batch, and what keeps one of its steps."""
        pipeline = copy.copy(self.pipeline)  # shares bundle, sessions and tokenizers
        sampler = Sampler(self.pipeline.bundle.component("transformer"))
        pipeline.step_hook = sampler
        return pipeline, sampler

    def add_batch(self, step: Step | None, seconds: float) -> None:
        """A batch took `seconds`; count its step if a count is due."""
        if self.reason is not None or step is None or not self._lock.acquire(blocking=False):
            return
        try:
            self.generating += seconds
            if self.generating >= self._due:
                took = self.count(step)
                # At random about the mean, so that not always the same kind of batch is counted.
                self._due = (self.seconds + (random.random() - 0.5) * took) / self.share
        finally:
            self._lock.release()

    def count(self, step: Step) -> float:
        """Run a step and add its choices; returns the seconds. A failure ends the counting."""
        inputs, top_k, kappa = step
        began = time.monotonic()
        try:
            if self._counting is None:
                self._counting = CountingBlocks(self.pipeline.executor("transformer"))
            self._counting.counts = {}
            self._counting(self.pipeline.cast(inputs), top_k, kappa)
        except Exception as error:  # generating goes on: the log says what is lost
            log.warning("experts are no longer counted: %s: %s", type(error).__name__, error)
            self.reason = f"failed: {type(error).__name__}"
            return 0.0
        for site, counts in self._counting.counts.items():
            self.counts[site] = self.counts.get(site, 0) + counts
        took = time.monotonic() - began
        self.steps += 1
        self.seconds += took
        return took


class Sampler:
    """Keeps one step of a batch, each as likely, and of it one image (reservoir sampling)."""

    def __init__(self, component: Mapping[str, Any]) -> None:
        self.component = component
        self.seen = 0
        self.step: Step | None = None

    def __call__(
        self, inputs: Mapping[str, np.ndarray], top_k: int | None, kappa: int | None
    ) -> None:
        """A step that runs.

        Steps without a choice (no experts, or none but the shared one) are passed over.
        """
        if not top_k:
            return
        self.seen += 1
        if random.random() * self.seen < 1:
            own = {name for name in inputs if per_sample(self.component, name)}
            # Any of them: with guidance the negative prompts' rows are the first half.
            row = random.randrange(min(len(inputs[name]) for name in own))
            rows = {name: array[row : row + 1] for name, array in inputs.items() if name in own}
            self.step = {**inputs, **rows}, top_k, kappa


def uncounted_reason(pipeline: Pipeline) -> str | None:
    """Why experts are not counted."""
    if not pipeline.manifest.get("top_k_choices"):
        return "no experts"
    if pipeline.backend not in ("ort", "ort-cuda"):
        return f"not on {pipeline.backend}"
    return None
