"""What `/metrics` tells Prometheus. Memory and CPU come from prometheus_client's own collector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

if TYPE_CHECKING:
    from runtime.serve.jobs import Jobs

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # process_resident_memory_bytes, on Linux
        PlatformCollector(registry=registry)
        self.requests = Counter(
            "d2m_requests", "Requests to /v1 by status.", ["status"], registry=registry
        )
        self.cancelled = Counter(
            "d2m_cancelled", "Requests given up, by reason.", ["reason"], registry=registry
        )
        self.images = Counter("d2m_images", "Images drawn.", registry=registry)
        self.steps = Counter("d2m_steps", "Denoising steps of batches.", registry=registry)
        self.blocks = Counter(
            "d2m_blocks_run", "Transformer blocks that images ran.", registry=registry
        )
        self.waiting = Gauge("d2m_queue_requests", "Requests that wait.", registry=registry)
        self.active = Gauge("d2m_drawing_requests", "Requests being drawn.", registry=registry)
        self.info = Gauge(
            "d2m_bundle_info", "The bundle.", ["name", "digest", "backend"], registry=registry
        )

        def histogram(name: str, help_: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(name, help_, buckets=buckets, registry=registry)

        self.seconds = histogram("d2m_request_seconds", "From arrival to answer, status 200.")
        self.queued = histogram("d2m_queue_seconds", "From arrival to drawing.")
        self.step_seconds = histogram("d2m_step_seconds", "One step of a batch.")
        self.batch = histogram("d2m_batch_images", "Images in a batch.", (1, 2, 4, 8, 16, 32))

    def watch(self, jobs: Jobs) -> None:
        """Read the queue's length when scraped."""
        self.waiting.set_function(lambda: float(len(jobs)))

    def text(self) -> bytes:
        """The exposition format."""
        found: bytes = generate_latest(self.registry)
        return found
