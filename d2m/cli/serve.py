"""d2m serve: a bundle behind OpenAI's images API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from d2m.cli import options
from d2m.cli.options import option


def serve(
    bundle: options.Bundle = None,
    host: Annotated[str, option("Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, option("Port to listen on; 0 takes a free one.")] = 8000,
    workers: Annotated[int, option("Worker threads, in one process.")] = 1,
    max_queue: Annotated[int, option("Requests that may wait; more get status 429.")] = 64,
    max_batch: Annotated[int, option("Largest batch; 1: every request alone.")] = 8,
    max_images: Annotated[int, option("Largest number of images per request.")] = 10,
    max_steps: Annotated[int, option("Largest number of steps per request.")] = 100,
    max_pixels: Annotated[
        int | None, option("Largest number of pixels per image; by default 4 times the bundle's.")
    ] = None,
    deadline: Annotated[float, option("Seconds until a request gets status 504.")] = 120.0,
    drain: Annotated[float, option("Seconds after SIGTERM to finish accepted requests.")] = 30.0,
    api_key_file: Annotated[
        Path | None, option("File with the API key of clients; or set D2M_API_KEY.")
    ] = None,
    log_prompts: Annotated[bool, option("Write prompts to the log.", "--log-prompts")] = False,
    example: Annotated[
        list[str] | None, option("Prompt that the page offers; may be repeated.")
    ] = None,
    model_alias: Annotated[
        list[str] | None, option("Another model name for clients; may be repeated.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, option("Origin allowed by CORS, '*' for all; may be repeated.")
    ] = None,
    loras: Annotated[
        Path | None, option("Folder of LoRAs that a request may name; needs one worker.")
    ] = None,
    backend: options.Backend = "auto",
    experts: options.Experts = "auto",
    debug: options.Debug = False,
) -> None:
    """Serve BUNDLE to OpenAI's clients: POST /v1/images/generations and /v1/images/edits.

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
        examples=example or (),
        loras=loras,
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
