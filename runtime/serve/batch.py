"""A batch of requests: what is equal in all of them, its one call, and what it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.bundle.block_groups import blocks_of
from runtime.program.step_cache import StepCache
from runtime.request import Request, one_or_list


def batch_key(request: Request) -> tuple[Any, ...]:
    """What must be equal in requests that share a batch.

    Where one of them is guided by a negative prompt all are: guidance and family decide it.
    """
    knobs = tuple(request.top_k), tuple(request.kappa), request.sigmas, request.cache
    return (request.height, request.width, request.guidance, *knobs)


def batch_call(requests: Sequence[Request]) -> dict[str, Any]:
    """The arguments of `Pipeline.__call__` for all images of requests with the same key."""
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
    # None: the bundle has no experts, or no groups.
    knobs = (("top_k", first.top_k), ("kappa", first.kappa))
    return call | {name: each for name, each in knobs if each[0] is not None}


def usage(
    manifest: Mapping[str, Any], request: Request, steps_skipped: float = 0.0
) -> dict[str, Any]:
    """Blocks that one image runs over all steps, of how many there are, and experts per token.

    Groups of blocks keep kappa of their blocks in every step; all others run. Of `steps_skipped`
    (step caching) at most the first block runs.
    """
    component = manifest["components"]["transformer"]
    blocks = len(blocks_of(component))
    sizes = [len(group["calls"]) for group in component.get("groups", {}).values()]
    skipped = sum(
        max(0, size - kappa) for kappa in request.kappa if kappa is not None for size in sizes
    )
    total, steps = blocks * len(request.top_k), len(request.top_k)
    run = float(total - skipped)
    if steps_skipped:
        cache = StepCache(request.cache, component)
        run -= steps_skipped * (run / steps - (cache.head - cache.cuts[0]))
    return {
        "blocks": round(run),
        "blocks_of": total,
        "experts_per_token": one_or_list(request.top_k),
        "experts_of": manifest.get("num_experts") if request.top_k[0] is not None else None,
    }
