"""The process: a socket, uvicorn, and what SIGTERM means.

At the first SIGTERM or Ctrl-C `/readyz` turns 503 and new requests are refused with 503, but the
socket stays open until all that was accepted is answered, or `drain` seconds are over: every client
gets an answer. At the second the process cancels everything at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from runtime.serve.app import make_app
from runtime.serve.connections import ACCEPTED, Connection, on_fault
from runtime.serve.service import Service

log = logging.getLogger("runtime.serve")
KEEP_ALIVE = 15  # seconds
WAITING = 2048  # connections that the system holds until they are accepted


def serve(
    service: Service,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    key: str | None = None,
    drain: float = 30.0,
    log_prompts: bool = False,
    origins: Sequence[str] = (),
) -> None:
    """Serve until a signal; port 0 takes a free one. Raises OSError where it is taken."""
    if key is not None and (len(key) < 8 or not key.isascii() or not key.isprintable()):
        raise ValueError("the API key is too short or not plain ASCII, expected 8 letters or more.")
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of clients' mistakes
    with listen(host, port) as listener:
        name, port = listener.getsockname()[:2]
        local = ipaddress.ip_address(name.partition("%")[0]).is_loopback
        if not local and key is None:
            log.warning(
                "%s is open to the network and no API key is required: set D2M_API_KEY", name
            )
        hosts = None
        if local and key is None:
            hosts = {"localhost", "127.0.0.1", "[::1]", host.lower()}
        service.start()
        shown = f"[{name}]" if ":" in name else name
        print(f"serving {service.names[0]} at http://{shown}:{port}", file=sys.stderr, flush=True)
        app = make_app(service, key, hosts, log_prompts, origins)
        Server(app, service, drain).run(sockets=[listener])


class Server(uvicorn.Server):
    """uvicorn's, but a signal lets requests end while the socket is still open."""

    def __init__(self, app: ASGIApp, service: Service, drain: float) -> None:
        self.service, self.drain = service, drain
        config = uvicorn.Config(
            app,
            http=Connection,
            backlog=ACCEPTED,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=5,  # what is left then was cancelled
            ws="none",
            lifespan="off",
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with a long queue in the system although few are accepted at a time."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(WAITING)
        asyncio.get_running_loop().set_exception_handler(on_fault)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain; second: stop at once."""
        if self.service.draining:
            self.should_exit = self.force_exit = True
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to stop."""
        if self.service.draining and not self.should_exit:
            now = asyncio.get_running_loop().time()
            self.until = getattr(self, "until", now + self.drain)
            self.should_exit = self.service.idle() or now >= self.until
        done: bool = await super().on_tick(counter)
        if done:
            # In another thread: this one sends the answers of what is cancelled.
            await asyncio.to_thread(self.service.close)
        return done


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises ValueError or OSError with one sentence."""
    if not 0 <= port < 65536:
        raise ValueError(f"the port is {port}, expected 0 (any free one) to 65535.")
    try:
        kind, passive = socket.SOCK_STREAM, socket.AI_PASSIVE
        family, _, proto, _, address = socket.getaddrinfo(host, port, type=kind, flags=passive)[0]
    except (socket.gaierror, UnicodeError):
        raise ValueError(f"the host is {host!r}, expected an address of this machine.") from None
    # asyncio sets TCP_NODELAY only where the socket names its protocol: without it every answer on
    # a kept connection waits 44 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(WAITING)
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()};"
            " choose others with --host and --port"
        ) from None
    listener.setblocking(False)
    return listener
