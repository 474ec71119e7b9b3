"""A batch of requests: what is equal in all of them, its one call, and what it runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.request import Request, one_or_list

BLOCK = re.compile(r"\w+\.\d+\.")  # the weight prefix of a block, not of the transformer's ends


def batch_key(request: Request) -> tuple[Any, ...]:
    """What must be equal in requests that share a batch.

    Where one of them is guided by a negative prompt all are: guidance and family decide it.
    """
    knobs = tuple(request.top_k), tuple(request.kappa), request.sigmas
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
    }
    if first.negative is not None:
        call["negative"] = [text for request in requests for text in request.negative or []]
    # None: the bundle has no experts, or no groups.
    knobs = (("top_k", first.top_k), ("kappa", first.kappa))
    return call | {name: each for name, each in knobs if each[0] is not None}


def usage(manifest: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """Blocks that one image runs over all steps, of how many there are, and experts per token.

    Groups of blocks keep kappa of their blocks in every step; all others run.
    """
    component = manifest["components"]["transformer"]
    blocks = sum(1 for call in component["program"] if BLOCK.match(call["prefix"]))
    sizes = [len(group["calls"]) for group in component.get("groups", {}).values()]
    skipped = sum(
        max(0, size - kappa) for kappa in request.kappa if kappa is not None for size in sizes
    )
    total = blocks * len(request.top_k)
    return {
        "blocks": total - skipped,
        "blocks_of": total,
        "experts_per_token": one_or_list(request.top_k),
        "experts_of": manifest.get("num_experts") if request.top_k[0] is not None else None,
    }
