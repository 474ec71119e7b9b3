"""A bundle that is served: its pipeline, the queue before it and the threads behind it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.bundle.directory import open_bundle, required_key
from runtime.bundle.lora_record import placement_of
from runtime.families import is_guided
from runtime.images.given import example_images
from runtime.lora.folder import lora_names
from runtime.measure.expert_load import Meter
from runtime.opened import default_bundle
from runtime.pipeline import Pipeline
from runtime.program.backends import GPU_BACKENDS
from runtime.program.threads import thread_count
from runtime.request import check_request, whole_number
from runtime.sampling import Cancelled
from runtime.serve.batch_invariance import MinBatches
from runtime.serve.edits.upload import Held
from runtime.serve.generate_threads import GenerateThreads
from runtime.serve.image_request import (
    EditImages,
    ImageRequest,
    Limits,
    Refused,
    check_fields,
    image_count,
)
from runtime.serve.jobs import Full, Generated, Job, Jobs
from runtime.serve.metrics import Metrics

log = logging.getLogger("runtime.serve")
EXAMPLES = (  # of the shapes world
    "a photo of a red circle",
    "a green square and a white cross",
    "three circles",
    "a blue triangle above a yellow square",
)
MAX_PIXELS = 4  # times the bundle's own size, where no other limit is given


class Service:
    """Everything behind the routes; of HTTP it has the status of a refused request alone."""

    def __init__(
        self,
        bundle: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        *,
        workers: int = 1,
        max_queue: int = 64,
        max_batch: int = 8,
        max_images: int = 10,
        max_steps: int = 100,
        max_pixels: int | None = None,
        deadline: float = 120.0,
        threads: int | None = None,
        experts: str = "auto",
        aliases: Sequence[str] = (),
        examples: Sequence[str] = (),
        loras: str | os.PathLike[str] | None = None,
    ) -> None:
        """`aliases`: further names by which clients may request the model; `examples`: prompts
        that the page offers, by default those of the bundle that ships; `loras`: a folder of LoRAs
        that requests may name.

        Raises what runtime.load raises; ValueError for a number or a name out of range.
        """
        workers = whole_number(workers, "workers", 1, 64)
        if not 0.001 <= deadline <= 86_400:
            raise ValueError(f"the deadline is {deadline!r}, expected seconds from 0.001 to 86400.")
        opened = open_bundle(bundle or default_bundle(), key=required_key())
        size = opened.manifest["files"][opened.component("transformer")["weights"]]["size"]
        # The sessions' threads are shared by the workers, each of which computes as well.
        threads = max(1, thread_count(threads, size) - workers + 1)
        self.pipeline = Pipeline(
            opened,
            backend,
            threads=threads,
            experts=experts,
            max_batch=whole_number(max_batch, "max-batch", 1, 64),
        )
        if workers > 1 and self.pipeline.backend in GPU_BACKENDS:
            raise ValueError(
                f"workers is {workers}, expected 1 with backend {self.pipeline.backend!r}: a GPU"
                " generates one batch at a time; start one server for every GPU."
            )
        if loras is not None:
            if workers > 1:
                raise ValueError(
                    f"workers is {workers}, expected 1 with --loras: all of them share one set of"
                    " weights, which a LoRA changes; start a server per worker."
                )
            placement_of(opened)
            lora_names(Path(loras))
        self.loras = None if loras is None else Path(loras)
        for name in aliases:
            if not 0 < len(name) <= 200 or not name.isprintable():
                raise ValueError(f"model-alias is {name[:60]!r}, expected 1 to 200 characters.")
        shipped = opened.path.resolve() == default_bundle().resolve()
        self.examples = [*(examples or (EXAMPLES if shipped else ()))]
        self.names = [*dict.fromkeys([self.pipeline.manifest["name"], *aliases])]
        defaults = self.pipeline.manifest["defaults"]
        pixels = MAX_PIXELS * int(defaults["height"]) * int(defaults["width"])
        self.limits = Limits(
            images=whole_number(max_images, "max-images", 1, 1000),
            steps=whole_number(max_steps, "max-steps", 1, 1000),
            pixels=whole_number(
                pixels if max_pixels is None else max_pixels, "max-pixels", 1, 1 << 40
            ),
            deadline=deadline,
        )
        # From the queue to the threads: whatever counts or tries out images shares the pipeline.
        self.metrics = Metrics()
        self.jobs = Jobs(whole_number(max_queue, "max-queue", 1, 100_000))
        self.meter = Meter(self.pipeline)
        self.metrics.watch(self.jobs, self.meter)
        self.held = Held()
        self.metrics.held.set_function(lambda: float(self.held.bytes))
        self.decoding = asyncio.Lock()  # one file at a time is large in memory
        self.min_batches = MinBatches(self.pipeline)
        self.threads = GenerateThreads(
            self.meter, self.jobs, self.min_batches, self.metrics, workers
        )
        self.ready = self.draining = False
        self.pending = 0  # requests accepted and not yet answered

    def start(self) -> None:
        """Open every component, generate once, find out about batches; then take requests."""
        self.pipeline.warm()
        manifest = self.pipeline.manifest
        self.min_batches.of(check_request(manifest, "", steps=1, **example_images(manifest)))
        self.meter.start()
        bundle = self.pipeline.bundle
        self.metrics.info.labels(bundle.name, bundle.digest[:12], self.pipeline.backend).set(1)
        self.threads.start()
        self.ready = True

    def check(self, given: Mapping[str, Any], images: EditImages | None = None) -> ImageRequest:
        """Fields of the right types as a request; see `check_fields`."""
        pipeline = self.pipeline
        rules = pipeline.manifest, self.limits, pipeline.pick_knobs, self.names[1:], self.loras
        return check_fields(given, *rules, images)

    async def generate(
        self,
        request: ImageRequest,
        disconnect: asyncio.Task[None],
        on_step: Callable[[int, int], None] | None = None,
    ) -> tuple[Job, Generated]:
        """Queue a request and wait: for its images, its deadline or its client's `disconnect`.

        `on_step(done, steps)` is called by another thread while its images are generated.

        Raises Refused: 429 where the queue is full, 503 where the server stops, 504 at the
        deadline, 499 (which nobody reads) where the client left, 500 for a fault.
        """
        if self.draining or not self.ready:
            message = "the server is stopping; send the request to another."
            raise Refused(503, message, retry_after=self.retry_after())
        job = Job(request, on_step=on_step)
        try:
            self.jobs.put(job)
        except Full:
            raise Refused(
                429,
                f"{self.jobs.limit} requests wait, which is the most allowed; try again later.",
                code="rate_limit_exceeded",
                retry_after=self.retry_after(),
            ) from None
        answer = asyncio.wrap_future(job.answer)
        self.pending += 1
        try:
            first: set[asyncio.Future[Any]] = {answer, disconnect}
            when = asyncio.FIRST_COMPLETED
            await asyncio.wait(first, timeout=request.deadline, return_when=when)
            if answer.done():
                return job, answer.result()
        except Cancelled:
            raise Refused(503, "the server stopped before the images were generated.") from None
        except Refused:
            raise
        except Exception as error:
            log.error("generating failed: %s: %s", type(error).__name__, error)
            raise Refused(
                500, f"the images could not be generated ({type(error).__name__}); see the log."
            ) from None
        finally:
            self.pending -= 1
            if not answer.done():
                self.jobs.remove(job)
                answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        if disconnect.done():
            raise self.client_left()
        self.metrics.cancelled.labels("deadline").inc()
        raise Refused(
            504,
            f"no image within {request.deadline:g} seconds; request fewer steps, fewer images or"
            " more time.",
            code="deadline_exceeded",
        )

    def client_left(self) -> Refused:
        """What is raised, for the log and the metrics, where the client left."""
        self.metrics.cancelled.labels("disconnect").inc()
        return Refused(499, "the client has left.")

    def retry_after(self) -> int:
        """Seconds after which to try again: what waits, at the recent throughput."""
        seconds = self.threads.seconds_per_image / self.threads.workers
        return max(1, min(600, math.ceil((self.jobs.images + 1) * seconds)))

    def idle(self) -> bool:
        """Whether nothing waits and nothing is generated."""
        return not self.pending

    def close(self, seconds: float = 5.0) -> None:
        """Cancel what waits and what is generated, and end the threads."""
        self.draining = True
        for job in self.jobs.close():
            job.cancelled.set()
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(Cancelled("the server stopped."))
        for job in list(self.threads.active):
            job.cancelled.set()
        if self.ready:
            self.threads.join(seconds)

    def facts(self, name: str) -> dict[str, Any]:
        """What a client may want to know beforehand; `name`: one of `names`."""
        manifest = self.pipeline.manifest
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "d2m",
            "kind": manifest["kind"],
            "bundle": self.pipeline.bundle.digest,
            "backend": self.pipeline.backend,
            "defaults": manifest["defaults"],
            "edits": image_count(manifest),  # how many images it takes; 0: none
            "negative_prompt": is_guided(self.pipeline.manifest),  # whether it takes one
            "kappa": manifest.get("kappa"),
            "top_k": manifest.get("top_k"),
            "top_k_choices": manifest.get("top_k_choices") or [],
            "examples": self.examples,
            "loras": [] if self.loras is None else sorted(lora_names(self.loras)),
        }
