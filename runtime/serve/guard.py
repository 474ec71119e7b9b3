"""Before every route: the host and the API key checked, and one line of log without a prompt."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serve.image_request import Refused
from runtime.serve.metrics import Metrics

log = logging.getLogger("runtime.serve")
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI around the application. Plain ASGI, so that the route is still told of a disconnect.

    `hosts`: names that the Host header may have, None for any. Without such a list a page of
    another site could reach a server on loopback by giving its own name that address. Starlette's
    TrustedHostMiddleware answers in plain text, and its older releases take "localhost:evil".
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, key: str | None, hosts: set[str] | None
    ) -> None:
        self.app, self.metrics, self.hosts = app, metrics, hosts
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        request_id = uuid.uuid4().hex[:16]

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in {**HEADERS, "x-request-id": request_id}.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            refused = self.refusal(Headers(scope=scope), scope["path"])
            await (refused.response() if refused else self.app)(scope, receive, send_with_headers)
        finally:
            if scope["path"].startswith("/v1/"):
                self.metrics.requests.labels(str(status)).inc()
                path = scope["path"][:80] if scope["path"].isprintable() else "?"
                seconds = time.monotonic() - began
                line = "%s %s %s %d %.3f s"
                log.info(line, request_id, scope["method"], path, status, seconds)

    def refusal(self, headers: Headers, path: str) -> Refused | None:
        """421 for another host, 401 without the key."""
        if self.hosts is not None:
            host = headers.get("host", "")
            # After the name nothing but a port: "localhost:80@evil.com" is another host.
            if re.sub(r":[0-9]{1,5}\Z", "", host).lower() not in self.hosts:
                return Refused(421, f"the host is {host[:60]!r}, which this server is not.")
        if self.key is not None and path.startswith("/v1/"):
            given = headers.get("authorization", "").encode("latin-1")
            # Compared in constant time: a wrong key takes as long as one that is nearly right.
            if not hmac.compare_digest(given, b"Bearer " + self.key):
                return Refused(
                    401,
                    "the API key is missing or wrong, expected it as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                )
        return None
