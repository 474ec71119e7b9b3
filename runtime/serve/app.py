"""The routes: OpenAI's images API and a page, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from runtime.request import one_or_list
from runtime.serve.batch import usage
from runtime.serve.edits.edit_request import form_schema, read_edit, refuse_other_site
from runtime.serve.edits.upload import EDITS, read_form
from runtime.serve.guard import Guard
from runtime.serve.image_request import MAX_BODY, TOO_LARGE, ImageRequest, Refused, fields_of, parse
from runtime.serve.jobs import Generated, Job
from runtime.serve.page import read_page
from runtime.serve.service import Service
from runtime.serve.stream import Steps, Task, begun, events

log = logging.getLogger("runtime.serve")
BODY_SECONDS = 10.0  # within which a request's body must have arrived
NOTES = "x-d2m-notes"  # the header that says what was not done as requested


def make_app(
    service: Service,
    key: str | None = None,
    hosts: set[str] | None = None,
    log_prompts: bool = False,
    origins: Sequence[str] = (),
) -> ASGIApp:
    """The ASGI application.

    `key` guards /v1; `hosts`, see Guard; prompts are logged with `log_prompts` only; `origins`:
    sites whose pages may call it ("*": all).
    """
    app = FastAPI(title="d2m", docs_url=None, redoc_url=None)
    page, policy = read_page()
    # starlette answers HEAD where GET is, FastAPI does not; probes and balancers send it.
    get = partial(app.api_route, methods=["GET", "HEAD"], include_in_schema=False)
    schema = fields_of(service.limits).model_json_schema()
    body = {"content": {"application/json": {"schema": schema}}, "required": True}
    form = {"schema": form_schema(service.limits)}
    form_body = {"content": {"multipart/form-data": form}, "required": True}

    @app.post("/v1/images/generations", openapi_extra={"requestBody": body})
    async def generate(request: Request) -> Response:
        """Generate what the JSON body asks for (see image_request.py)."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A browser sends this type to another site only where that site allows it, which
            # `origins` decides.
            raise Refused(415, f"the body is {kind[:60]!r}, expected application/json.")
        try:
            content = await read_body(request)
        except ClientDisconnect:
            raise service.client_left() from None
        return await answered(request, service.check(parse(content, service.limits)), ExitStack())

    @app.post(EDITS, openapi_extra={"requestBody": form_body})
    async def edit(request: Request) -> Response:
        """Change the images of a multipart body as it asks for (see edits/)."""
        refuse_other_site(request, origins)
        with ExitStack() as kept:
            with service.held.take(service.retry_after) as keep:
                try:
                    form = await read_form(request, keep)
                except ClientDisconnect:
                    raise service.client_left() from None
                image_request = await read_edit(form, service)
            kept.enter_context(service.held.take(service.retry_after))(image_request.nbytes)
            return await answered(request, image_request, kept)

    async def answered(request: Request, image_request: ImageRequest, kept: ExitStack) -> Response:
        """The answer once the images were generated; or a stream, at whose end `kept` closes."""
        arguments = image_request.arguments
        if log_prompts:
            negative = f", negative {arguments.negative[0]!r}" if arguments.negative else ""
            log.info("prompt %r%s", arguments.prompts[0], negative)
        disconnect = asyncio.ensure_future(disconnected(request))
        if image_request.stream:
            loop, steps = asyncio.get_running_loop(), Steps()

            def on_step(done: int, total: int) -> None:
                loop.call_soon_threadsafe(steps.put_nowait, (done, total))

            work = service.generate(image_request, disconnect, on_step)
            task: Task = asyncio.ensure_future(work)
            task.add_done_callback(lambda _: disconnect.cancel())
            close = kept.pop_all().close
            task.add_done_callback(lambda _: close())
            await begun(task, steps)
            return StreamingResponse(
                events(task, steps, partial(finished, service)),
                media_type="text/event-stream",
                headers={"cache-control": "no-store"},
            )
        try:
            job, generated = await service.generate(image_request, disconnect)
        finally:
            disconnect.cancel()
        answer = finished(service, job, generated)
        notes = answer["d2m"]["notes"]
        return JSONResponse(answer, headers={NOTES: " | ".join(notes)} if notes else None)

    @get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is here, under each of its names, with its defaults."""
        return {"object": "list", "data": list(map(service.facts, service.names))}

    @get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        if name not in service.names:
            known = ", ".join(map(repr, service.names))
            message = f"the model is {name[:60]!r}, expected {known}."
            raise Refused(404, message, param="model", code="model_not_found")
        return service.facts(name)

    @get("/healthz")
    async def healthy() -> Response:
        """Whether the process works: 200 as long as its threads live."""
        alive = service.threads.alive() or not service.ready or service.draining
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 500)

    @get("/readyz")
    async def ready() -> Response:
        """Whether to send requests here."""
        state = "draining" if service.draining else "ready" if service.ready else "starting"
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        text = service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @get("/")
    async def try_it() -> Response:
        """The page."""
        return Response(
            page, media_type="text/html; charset=utf-8", headers={"content-security-policy": policy}
        )

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        """One sentence, as OpenAI's clients expect it."""
        return error.response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        """No such path, or not with this method."""
        what = f"{request.method} {request.url.path[:80]}: {error.detail}."
        return Refused(error.status_code, what).response(error.headers)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        """A fault of ours; uvicorn logs its traceback."""
        return Refused(500, "the server has an error of its own; see its log.").response()

    guarded: ASGIApp = Guard(app, service.metrics, key, hosts)
    if not origins:
        return guarded
    return CORSMiddleware(  # outside of Guard: a browser's preflight request has no key
        guarded,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[NOTES, "x-request-id", "retry-after"],
    )


async def read_body(request: Request) -> bytes:
    """The body, within its limits of size and time; raises Refused 413 or 408."""
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    too_large = Refused(413, f"the body is too large, expected at most {MAX_BODY} bytes.")
    if declared.isascii() and declared.isdigit() and len(declared) > len(str(MAX_BODY)):
        raise too_large
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY or TOO_LARGE in request.scope:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body was not complete within {BODY_SECONDS:g} seconds.") from None
    return bytes(body)


async def disconnected(request: Request) -> None:
    """Returns when the client has left; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def finished(service: Service, job: Job, generated: Generated) -> dict[str, Any]:
    """The answer of a job that is done, which the metrics then count."""
    service.metrics.seconds.observe(time.monotonic() - job.entered)
    service.metrics.queued.observe(generated.began - job.entered)
    return answer_of(service, job, generated)


def answer_of(service: Service, job: Job, generated: Generated) -> dict[str, Any]:
    """OpenAI's answer, with `seed` for every image and `d2m`: what was run and how long it took."""
    request, manifest = job.request.arguments, service.pipeline.manifest
    data = [
        {"b64_json": base64.b64encode(image).decode("ascii"), "seed": seed}
        for image, seed in zip(generated.images, request.seeds, strict=True)
    ]
    return {
        "created": int(time.time()),
        "data": data,
        "output_format": job.request.format,
        "size": f"{request.width}x{request.height}",
        "d2m": {
            "model": manifest["name"],
            "bundle": service.pipeline.bundle.digest,
            "backend": generated.backend,
            "steps": len(request.top_k),
            "guidance": request.guidance,
            "kappa": one_or_list(request.kappa),
            "cache": request.cache.text,
            "steps_skipped": generated.steps_skipped,
            **usage(manifest, request, generated.steps_skipped),
            **job.request.edit,
            "notes": [*job.request.notes, *generated.notes],
            "seconds_queued": round(generated.began - job.entered, 4),
            "seconds_generating": round(generated.ended - generated.began, 4),
        },
    }
