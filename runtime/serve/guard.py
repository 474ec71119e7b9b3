"""Before every route: is the host ours, is the key right, and one line of log without a prompt."""

from __future__ import annotations

import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from runtime.serve.asked import Refused

if TYPE_CHECKING:
    from runtime.serve.metrics import Metrics

log = logging.getLogger("runtime.serve")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI around the application. Plain ASGI, so that the route still hears of a disconnect.

    `hosts`: names that the Host header may have, None for any. Without such a list a page of
    another site could reach a server on loopback by giving its own name that address.
    """

    def __init__(self, app: App, metrics: Metrics, key: str | None, hosts: set[str] | None) -> None:
        self.app, self.metrics, self.hosts = app, metrics, hosts
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        request_id = uuid.uuid4().hex[:16]

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = HEADERS | {"x-request-id": request_id}
                taken = {name for name, _ in message.get("headers", [])}
                message["headers"] = [
                    *message.get("headers", []),
                    *(
                        (k.encode(), v.encode())
                        for k, v in extra.items()
                        if k.encode() not in taken
                    ),
                ]
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, receive, tell)
        except Refused as refused:
            await answer(tell, refused)
        finally:
            if scope["path"].startswith("/v1/"):
                self.metrics.requests.labels(str(status)).inc()
                path = scope["path"][:80] if scope["path"].isprintable() else "?"
                seconds = time.monotonic() - began
                line = "%s %s %s %d %.3f s"
                log.info(line, request_id, scope["method"], path, status, seconds)

    def check(self, scope: Scope) -> None:
        """Raises Refused: 421 for another host, 401 without the key."""
        headers = dict(scope["headers"])
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name.lower() not in self.hosts:
                raise Refused(421, f"the host is {name[:60]!r}, which this server is not.")
        if self.key is not None and scope["path"].startswith("/v1/"):
            given = headers.get(b"authorization", b"")
            # Compared in constant time: a wrong key takes as long as one that is nearly right.
            if not hmac.compare_digest(given, b"Bearer " + self.key):
                raise Refused(
                    401,
                    "the API key is missing or wrong, expected it as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                )


async def answer(send: Send, refused: Refused) -> None:
    """An error as OpenAI's API gives it."""
    body = json.dumps(refused.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
