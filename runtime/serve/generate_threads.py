"""Threads that generate: each takes the oldest request and others that are like it."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from runtime.image import settings_of, to_file
from runtime.sampling import Cancelled
from runtime.serve.batch import batch_call, usage
from runtime.serve.image_request import ImageRequest, Refused
from runtime.serve.jobs import Generated, Job, Jobs

if TYPE_CHECKING:
    from runtime.measure.expert_load import Meter, Step
    from runtime.serve.batch_invariance import MinBatches
    from runtime.serve.metrics import Metrics

log = logging.getLogger("runtime.serve")


class GenerateThreads:
    """`workers` threads on one pipeline: they share its weights and sessions.

    ONNX Runtime lets go of Python's lock while it computes, so threads do what processes would,
    with the weights in memory once.
    """

    def __init__(
        self, meter: Meter, jobs: Jobs, min_batches: MinBatches, metrics: Metrics, workers: int
    ) -> None:
        self.meter, self.pipeline = meter, meter.pipeline
        self.jobs, self.min_batches, self.metrics = jobs, min_batches, metrics
        self.workers = workers
        self.seconds_per_image = 1.0  # a running mean, for Retry-After
        self.active: list[Job] = []
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self.work, name=f"generate-{i}", daemon=True)
            for i in range(workers)
        ]

    def start(self) -> None:
        """Begin to take jobs."""
        for thread in self._threads:
            thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the threads after the queue was closed."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def alive(self) -> bool:
        """Whether every thread is still there."""
        return all(thread.is_alive() for thread in self._threads)

    def work(self) -> None:
        """A thread's life: until the queue is closed."""
        while (job := self.jobs.first()) is not None:
            batch = [job]
            try:
                key = job.request.key
                if key is not None and self.pipeline.loras:  # what is tried out has none
                    self.pipeline.set_loras(None)
                min_batch = None if key is None else self.min_batches.of(job.request.arguments)
                if key is not None and min_batch is not None:
                    batch += self.jobs.take_similar(key, self.pipeline.max_batch - job.images)
                # From here on only this thread ends an answer: a request's task may be cancelled.
                batch = [job for job in batch if job.answer.set_running_or_notify_cancel()]
                self.generate(batch, min_batch or 0)
            except Exception as error:  # the thread must live on, and the clients get an answer
                for each in batch:
                    if not each.answer.done():
                        each.answer.set_exception(error)

    def generate(self, batch: list[Job], min_batch: int) -> None:
        """Generate a batch and answer its jobs; where it fails, each of them on its own.

        `min_batch`: of runtime.serve.batch_invariance, 0 where there is none.
        """
        batch = [job for job in batch if not job.cancelled.is_set()]
        if not batch:
            return
        with self._lock:
            self.active += batch
        self.metrics.active.inc(len(batch))
        counted = None
        try:
            images, began, step, skipped = self.images(batch, min_batch)
        except Cancelled as error:
            for job in batch:
                job.answer.set_exception(error)
            return
        except Exception as error:
            log.warning("a batch of %d failed: %s: %s", len(batch), type(error).__name__, error)
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
        else:
            ended = time.monotonic()
            for job in batch:
                mine, images = images[: job.images], images[job.images :]
                notes = self.pipeline.truncations(job.request.arguments.prompts[0])
                answer = Generated(mine, notes, began, ended, self.pipeline.backend, skipped)
                job.answer.set_result(answer)
            counted = step, ended - began
        finally:
            with self._lock:
                self.active = [job for job in self.active if job not in batch]
            self.metrics.active.dec(len(batch))
        if counted is not None:
            self.meter.add_batch(*counted)  # after the answers, so that none waits for it
            return
        for job in batch:  # one request's failure is not another's
            self.generate([job], min_batch)

    def set_loras(self, request: ImageRequest) -> None:
        """The weights as a request asks for; Refused, 400, where a file cannot be used."""
        asked = dict(request.loras)
        if not asked and not self.pipeline.loras:
            return
        try:
            self.pipeline.set_loras(asked)
        except (ValueError, OSError) as error:  # whose sentence names paths of this machine
            log.warning("a LoRA was refused: %s", error)
            names = ", ".join(path.stem for path in asked)
            raise Refused(
                400, f"lora {names} cannot be used with this model; see the log.", param="lora"
            ) from None

    def images(
        self, batch: list[Job], min_batch: int
    ) -> tuple[list[bytes], float, Step | None, float]:
        """A batch's image files in order, when generating began, one of its steps, and how many
        steps of an image were skipped (a batch that is cached is one request's)."""
        request = batch[0].request.arguments
        self.set_loras(batch[0].request)
        pipeline, sampler = self.meter.sampled_pipeline()
        pipeline.min_batch = min_batch
        began = last = time.monotonic()
        before = ""
        steps = len(request.top_k) - request.images.first_step(len(request.top_k))

        def progress(phase: str, done: int, total: int) -> None:
            nonlocal last, before
            now = time.monotonic()
            if phase == before == "denoise":  # reported before the first step and after each
                self.metrics.steps.inc()
                self.metrics.step_seconds.observe(now - last)
            last, before = now, phase
            if phase == "denoise":
                for job in batch:
                    if job.on_step is not None:  # done and total count every image's steps
                        job.on_step(done * steps // total, steps)

        images = pipeline(
            **batch_call([job.request.arguments for job in batch]),
            progress=progress,
            cancel=lambda: all(job.cancelled.is_set() for job in batch),
        )
        assert isinstance(images, list)
        skipped = sum(settings_of(image).get("steps_skipped", 0.0) for image in images)
        skipped = round(skipped / len(images), 3)
        run = usage(self.pipeline.manifest, request, skipped)["blocks"]
        self.metrics.images.inc(len(images))
        self.metrics.blocks.inc(run * len(images))
        self.metrics.batch.observe(len(images))
        spent = (time.monotonic() - began) / len(images)
        self.seconds_per_image += 0.2 * (spent - self.seconds_per_image)
        requests = [job.request for job in batch for _ in range(job.images)]
        files = [
            to_file(image, each.format, each.compression)
            for image, each in zip(images, requests, strict=True)
        ]
        return files, began, sampler.step, skipped
