"""d2m serve: a bundle behind OpenAI's images API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from d2m.cli import options


def serve(
    bundle: options.Bundle = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(help="Threads that generate, in one process.")] = 1,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; then status 429.")] = 64,
    max_batch: Annotated[
        int, typer.Option(help="Images generated together; 1: every request alone.")
    ] = 8,
    max_images: Annotated[int, typer.Option(help="The most images of one request.")] = 10,
    max_steps: Annotated[int, typer.Option(help="The most steps of one request.")] = 100,
    max_pixels: Annotated[
        int | None, typer.Option(help="Of one image; 4 times the bundle's own size.")
    ] = None,
    deadline: Annotated[float, typer.Option(help="Seconds to an answer; then status 504.")] = 120.0,
    drain: Annotated[
        float, typer.Option(help="Seconds to answer what was accepted after SIGTERM.")
    ] = 30.0,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key clients must give, or D2M_API_KEY.")
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts to the log.")
    ] = False,
    model_alias: Annotated[
        list[str] | None, typer.Option(help="Another name that clients may give; may be repeated.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Site whose pages may call it, '*' for all; may be repeated."),
    ] = None,
    backend: options.Backend = "auto",
    experts: options.Experts = "auto",
    debug: options.Debug = False,
) -> None:
    """Serve BUNDLE to OpenAI's clients: POST /v1/images/generations.

    There is a page on /, and /metrics for Prometheus.

    --workers are threads that share one set of weights; a GPU takes one, so start a server per GPU.
    """
    import logging

    from runtime.serve.server import serve as function
    from runtime.serve.service import Service

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    key = os.environ.get("D2M_API_KEY") or None
    if api_key_file is not None:
        key = api_key_file.read_text(encoding="utf-8").strip()
    service = Service(
        bundle,
        backend,
        workers=workers,
        max_queue=max_queue,
        max_batch=max_batch,
        max_images=max_images,
        max_steps=max_steps,
        max_pixels=max_pixels,
        deadline=deadline,
        experts=experts,
        aliases=model_alias or (),
    )
    function(
        service,
        host,
        port,
        key=key,
        drain=drain,
        log_prompts=log_prompts,
        origins=cors_origin or (),
    )
