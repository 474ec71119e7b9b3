"""The routes: OpenAI's images API, health, metrics and a page to try a prompt."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from runtime.arguments import one_or_all
from runtime.serve.asked import MAX_BODY, Refused, read_asked
from runtime.serve.guard import Guard
from runtime.serve.jobs import Drawn, Job
from runtime.serve.page import read_page
from runtime.serve.service import Service
from runtime.serve.usage import usage

log = logging.getLogger("runtime.serve")
BODY_SECONDS = 10.0  # within which a request's body must have arrived


def make_app(
    service: Service,
    key: str | None = None,
    hosts: set[str] | None = None,
    log_prompts: bool = False,
) -> Guard:
    """The ASGI application. `key` guards /v1; `hosts`, see Guard;
    prompts are logged where `log_prompts` says so and nowhere else."""
    app = FastAPI(title="d2m", docs_url=None, redoc_url=None, openapi_url=None)
    page, policy = read_page()

    @app.post("/v1/images/generations")
    async def generate(request: Request) -> Response:
        """Draw what the JSON body asks for (see asked.py)."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A browser sends this type to another site only after asking it, and we say no.
            raise Refused(415, f"the body is {kind[:60]!r}, expected application/json.")
        body = await read_body(request)
        pipeline = service.pipeline
        asked = read_asked(body, pipeline.manifest, service.limits, pipeline.within)
        if log_prompts:
            against = f", negative {asked.request.negative[0]!r}" if asked.request.negative else ""
            log.info("prompt %r%s", asked.request.prompts[0], against)
        gone = asyncio.ensure_future(disconnected(request))
        try:
            job, drawn = await service.draw(asked, gone)
        finally:
            gone.cancel()
        now = time.monotonic()
        service.metrics.seconds.observe(now - job.entered)
        service.metrics.queued.observe(drawn.began - job.entered)
        return JSONResponse(answer_of(service, job, drawn))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is here, with its defaults."""
        return {"object": "list", "data": [service.facts()]}

    @app.get("/healthz")
    async def healthy() -> Response:
        """Whether the process is to be kept: 200 as long as its threads live."""
        well = service.drawing.alive() or not service.ready or service.draining
        return JSONResponse({"status": "ok" if well else "dead"}, 200 if well else 500)

    @app.get("/readyz")
    async def ready() -> Response:
        """Whether to send requests here."""
        state = "draining" if service.draining else "ready" if service.ready else "starting"
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        text = service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def try_it() -> Response:
        """The page."""
        return Response(
            page, media_type="text/html; charset=utf-8", headers={"content-security-policy": policy}
        )

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        """One sentence, as OpenAI's clients expect it."""
        headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        """No such path, or not with this method."""
        what = f"{request.method} {request.url.path[:80]}: {error.detail}."
        body = Refused(error.status_code, what).body()
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        """A fault of ours; uvicorn logs its traceback."""
        return JSONResponse(Refused(500, "a fault of the server's; see its log.").body(), 500)

    return Guard(app, service.metrics, key, hosts)


async def read_body(request: Request) -> bytes:
    """The body, within its limits of size and time; raises Refused 413 or 408."""
    declared = request.headers.get("content-length", "0")
    parts, size = [], 0
    too_large = Refused(413, f"the body is too large, expected at most {MAX_BODY} bytes.")
    if declared.isascii() and declared.isdigit() and len(declared) > len(str(MAX_BODY)):
        raise too_large
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > MAX_BODY:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"no whole body within {BODY_SECONDS:g} seconds.") from None
    return b"".join(parts)


async def disconnected(request: Request) -> None:
    """Returns when the client has gone; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def answer_of(service: Service, job: Job, drawn: Drawn) -> dict[str, Any]:
    """OpenAI's answer, with `seed` for every image and `d2m`: what was run and how long it took."""
    request, manifest = job.asked.request, service.pipeline.manifest
    data = [
        {"b64_json": base64.b64encode(png).decode("ascii"), "seed": seed}
        for png, seed in zip(drawn.pngs, request.seeds, strict=True)
    ]
    return {
        "created": int(time.time()),
        "data": data,
        "output_format": "png",
        "size": f"{request.width}x{request.height}",
        "d2m": {
            "model": manifest["name"],
            "bundle": service.pipeline.bundle.digest,
            "backend": drawn.backend,
            "steps": len(request.top_k),
            "guidance": request.guidance,
            "kappa": one_or_all(request.kappa),
            **usage(manifest, request),
            "seconds_queued": round(drawn.began - job.entered, 4),
            "seconds_drawing": round(drawn.ended - drawn.began, 4),
        },
    }
