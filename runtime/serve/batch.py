"""A batch of requests: what is equal in all of them, its one call, and what it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.bundle.block_groups import blocks_of
from runtime.program.step_cache import StepCache
from runtime.request import Request, one_or_list

IMAGES = ("image", "mask", "control")


def batch_key(request: Request) -> tuple[Any, ...]:
    """What must be equal in requests that share a batch.

    Where one of them is guided by a negative prompt all are: guidance and family decide it.
    """
    knobs = tuple(request.top_k), tuple(request.kappa), request.sigmas, request.cache
    images = request.images
    given = tuple(getattr(images, name) is not None for name in IMAGES)
    return (request.height, request.width, request.guidance, *knobs, *given, images.strength)


def batch_call(requests: Sequence[Request]) -> dict[str, Any]:
    """The arguments of `Pipeline.__call__` for all images of requests with the same key.

    Images are given again as the 8 bits that they were made of, each its own size already.
    """
    first = requests[0]
    call: dict[str, Any] = {
        "prompt": [text for request in requests for text in request.prompts],
        "seed": [seed or 0 for request in requests for seed in request.seeds],
        "steps": len(first.top_k),
        "guidance": first.guidance,
        "height": first.height,
        "width": first.width,
        "sigmas": first.sigmas,
        "cache": first.cache.text,
    }
    if first.negative is not None:
        call["negative"] = [text for request in requests for text in request.negative or []]
    for name in IMAGES:
        if getattr(first.images, name) is not None:
            rows = (row for request in requests for row in getattr(request.images, name))
            call[name] = [to_bytes(row) for row in rows]
    if first.images.references.pixels:
        call["references"] = list(map(to_bytes, first.images.references.pixels))
    if first.images.image is not None:
        call["strength"] = first.images.strength
    # None: the bundle has no experts, or no groups.
    knobs = (("top_k", first.top_k), ("kappa", first.kappa))
    return call | {name: each for name, each in knobs if each[0] is not None}


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """An image [3, H, W] from -1 to 1 -> [H, W, 3], uint8; a mask [1, H, W] -> [H, W], bool."""
    if len(pixels) == 1:
        return pixels[0] >= 0.5
    # Exact: float32 keeps 256 levels apart.
    return np.rint((pixels.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


def usage(
    manifest: Mapping[str, Any], request: Request, steps_skipped: float = 0.0
) -> dict[str, Any]:
    """Blocks that one image runs over the steps taken, of how many, and experts per token.

    Groups of blocks keep kappa of their blocks in every step; all others run. Of `steps_skipped`
    (step caching) at most the first block runs.
    """
    component = manifest["components"]["transformer"]
    blocks = len(blocks_of(component))
    sizes = [len(group["calls"]) for group in component.get("groups", {}).values()]
    taken = slice(request.images.first_step(len(request.top_k)), None)
    kept = [kappa for kappa in request.kappa[taken] if kappa is not None]
    skipped = sum(max(0, size - kappa) for kappa in kept for size in sizes)
    top_k = request.top_k[taken]
    total, steps = blocks * len(top_k), len(top_k)
    run = float(total - skipped)
    if steps_skipped:
        cache = StepCache(request.cache, component)
        run -= steps_skipped * (run / steps - (cache.head - cache.cuts[0]))
    return {
        "blocks": round(run),
        "blocks_of": total,
        "experts_per_token": one_or_list(top_k),
        "experts_of": manifest.get("num_experts") if top_k[0] is not None else None,
    }
