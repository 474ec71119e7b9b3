"""Connections: how many are open, how long they may be silent, how large a chunk may be.

uvicorn closes a connection that is silent after an answer, but not one that never asks, or whose
headers come a byte at a time; and where the process has no descriptor left asyncio logs a traceback
per connection that it would have accepted in one turn, which is its `backlog`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import sys
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.serve.edits.upload import EDITS, MAX_UPLOAD
from runtime.serve.image_request import MAX_BODY, TOO_LARGE

log = logging.getLogger("runtime.serve")
HEAD_SECONDS = 10.0  # from a connection's beginning, or a request's first byte, to its headers' end
MOST = 1000  # connections
ACCEPTED = 8  # in one turn of the event loop
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_logged: dict[str, float] = {}  # a sentence -> when it was last logged


class Connection(H11Protocol):  # type: ignore[misc]
    """uvicorn's, with limits; where too many are open, the one silent longest is closed."""

    timer: asyncio.TimerHandle | None = None
    since = 0.0  # when it began, or its last answer ended

    @property
    def waiting(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.since = self.loop.time()
        self.watch()
        open_ones = [each for each in self.connections if not each.transport.is_closing()]
        if len(open_ones) > most_connections():
            silent = [each for each in open_ones if each.waiting]  # this one among them
            min(silent, key=lambda each: each.since).shutdown()
            warn_rarely("too many connections: those that were silent longest are closed")

    def data_received(self, data: bytes) -> None:
        """What came: of a request's headers, of its body."""
        super().data_received(data)
        self.watch()
        # h11 reads a chunk's size and does not pass it on. A chunk that is too large is told to the
        # route, with a byte that wakes it, so that it refuses now and not when its time is over.
        size = getattr(getattr(self.conn, "_reader", None), "_bytes_in_chunk", 0)
        if size <= MAX_BODY or self.waiting or TOO_LARGE in self.scope:
            return
        if size > (MAX_UPLOAD if self.scope["path"] == EDITS else MAX_BODY):
            self.scope[TOO_LARGE] = True
            self.cycle.body += b"\0"
            self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        """An answer ended; uvicorn's own limit holds until the next byte comes."""
        self.since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        super().connection_lost(exc)
        self.watch(over=True)

    def watch(self, over: bool = False) -> None:
        """Keep the timer while a request's headers are waited for, and only then."""
        if self.timer is not None and (over or not self.waiting):
            self.timer.cancel()
            self.timer = None
        elif self.timer is None and self.waiting and not over:
            self.timer = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)


def most_connections() -> int:
    """Half of the files that this process may open, the other half being the bundle's and spare."""
    if sys.platform == "win32":
        return MOST
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST if files == resource.RLIM_INFINITY else min(MOST, files // 2)


def on_fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's faults: one line a minute where the system gives no more connections."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        warn_rarely(f"no connection can be accepted: {error.strerror}; raise the limit (ulimit -n)")
    else:
        loop.default_exception_handler(context)


def warn_rarely(sentence: str) -> None:
    """Log a warning, at most once a minute."""
    now = time.monotonic()
    if now - _logged.get(sentence, -math.inf) >= 60:
        _logged[sentence] = now
        log.warning("%s", sentence)
