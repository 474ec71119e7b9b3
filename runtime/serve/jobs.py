"""Requests that wait, in order of arrival; a batch takes the oldest and what is like it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.serve.image_request import ImageRequest


class Full(Exception):
    """The queue is full."""


@dataclass
class Generated:
    """A request's answer: image files, begin and end of generating (time.monotonic), on what."""

    images: list[bytes]
    notes: list[str]  # what was left out of the prompt
    began: float
    ended: float
    backend: str
    steps_skipped: float = 0.0  # by step caching, a mean over the images


@dataclass(eq=False)
class Job:
    """A request in the queue. Whoever cancels it sets `cancelled`; then nobody reads `answer`."""

    request: ImageRequest
    entered: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    answer: Future[Generated] = field(default_factory=Future)
    # Called by the thread that generates, (steps done, steps), where a client wants to know.
    on_step: Callable[[int, int], None] | None = None

    @property
    def images(self) -> int:
        """How many it asks for."""
        return len(self.request.arguments.prompts)


class Jobs:
    """A bounded queue between the event loop, which never waits here, and the threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.closed = False
        self._waiting: list[Job] = []
        self._change = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def images(self) -> int:
        """Images that wait."""
        with self._change:
            return sum(job.images for job in self._waiting)

    def put(self, job: Job) -> None:
        """Enter at the end; raises Full."""
        with self._change:
            if self.closed or len(self._waiting) >= self.limit:
                raise Full
            self._waiting.append(job)
            self._change.notify()

    def remove(self, job: Job) -> None:
        """Cancel a job: its place is free at once, or generating stops at the next step."""
        job.cancelled.set()
        with self._change:
            if job in self._waiting:
                self._waiting.remove(job)

    def first(self) -> Job | None:
        """The oldest job, waited for; None after close()."""
        with self._change:
            while not self._waiting and not self.closed:
                self._change.wait()
            return self._waiting.pop(0) if self._waiting else None

    def take_similar(self, key: tuple[Any, ...], room: int) -> list[Job]:
        """Further waiting jobs with this key, oldest first, at most `room` images together."""
        taken = []
        with self._change:
            for job in list(self._waiting):
                if job.request.key == key and job.images <= room:
                    self._waiting.remove(job)
                    taken.append(job)
                    room -= job.images
        return taken

    def close(self) -> list[Job]:
        """Take no more jobs and wake the threads; returns those that still waited."""
        with self._change:
            self.closed = True
            waiting, self._waiting = self._waiting, []
            self._change.notify_all()
        return waiting
