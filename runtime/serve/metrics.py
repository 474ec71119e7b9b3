"""`/metrics` for Prometheus. Memory and CPU come from prometheus_client's own collector."""

from __future__ import annotations

from collections.abc import Iterator
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
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from runtime.measure.expert_load import load_ratio

if TYPE_CHECKING:
    from runtime.measure.expert_load import Meter
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
            "d2m_cancelled", "Aborted requests, by reason.", ["reason"], registry=registry
        )
        self.images = Counter("d2m_images", "Images generated.", registry=registry)
        self.steps = Counter("d2m_steps", "Denoising steps of batches.", registry=registry)
        self.blocks = Counter(
            "d2m_blocks_run", "Transformer blocks that images ran.", registry=registry
        )
        self.waiting = Gauge("d2m_queue_requests", "Requests that wait.", registry=registry)
        self.active = Gauge("d2m_generating_requests", "Requests at work.", registry=registry)
        self.held = Gauge("d2m_edit_bytes", "Bodies and images of edits.", registry=registry)
        self.info = Gauge(
            "d2m_bundle_info", "The bundle.", ["name", "digest", "backend"], registry=registry
        )

        def histogram(name: str, help_: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(name, help_, buckets=buckets, registry=registry)

        self.seconds = histogram("d2m_request_seconds", "From arrival to answer, status 200.")
        self.queued = histogram("d2m_queue_seconds", "From arrival to generating.")
        self.step_seconds = histogram("d2m_step_seconds", "One step of a batch.")
        self.batch = histogram("d2m_batch_images", "Images in a batch.", (1, 2, 4, 8, 16, 32))

    def watch(self, jobs: Jobs, meter: Meter) -> None:
        """Read the queue's length and the experts' load when scraped."""
        self.waiting.set_function(lambda: float(len(jobs)))
        self.registry.register(ExpertLoad(meter))

    def text(self) -> bytes:
        """The exposition format."""
        text: bytes = generate_latest(self.registry)
        return text


class ExpertLoad:
    """A collector of what a meter has counted: tokens by FFN and expert, and each FFN's ratio."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        meter = self.meter
        known = GaugeMetricFamily(
            "d2m_expert_load_known", "Whether experts are counted; why not.", labels=["reason"]
        )
        known.add_metric([meter.reason or ""], float(meter.reason is None))
        yield known
        yield CounterMetricFamily(
            "d2m_expert_load_steps", "Steps of one image counted again.", value=meter.steps
        )
        yield CounterMetricFamily(
            "d2m_expert_load_seconds", "Time spent on counting.", value=meter.seconds
        )
        ratio = GaugeMetricFamily(
            "d2m_expert_load_ratio",
            "Tokens of an FFN's busiest expert over its experts' mean: 1 where they are even.",
            labels=["ffn"],
        )
        tokens = CounterMetricFamily(
            "d2m_expert_tokens", "Tokens that chose an expert, sampled.", labels=["ffn", "expert"]
        )
        for site, counts in sorted(dict(meter.counts).items()):
            ratio.add_metric([site], load_ratio(counts))
            for expert, count in enumerate(counts.tolist()):
                tokens.add_metric([site, str(expert)], count)
        yield ratio
        yield tokens
