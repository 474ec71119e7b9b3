"""A batch of requests: what is equal in all of them, and the one call that draws it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.arguments import Request


def key_of(request: Request) -> tuple[Any, ...]:
    """What must be equal in requests that share a batch.

    Where one of them is guided by a negative prompt all are: guidance and family decide it.
    """
    knobs = tuple(request.top_k), tuple(request.kappa), request.sigmas
    return (request.height, request.width, request.guidance, *knobs)


def call_of(requests: Sequence[Request]) -> dict[str, Any]:
    """The arguments of `Pipeline.__call__` for all images of requests with the same key."""
    first = requests[0]
    asked: dict[str, Any] = {
        "prompt": [text for request in requests for text in request.prompts],
        "seed": [seed or 0 for request in requests for seed in request.seeds],
        "steps": len(first.top_k),
        "guidance": first.guidance,
        "height": first.height,
        "width": first.width,
        "sigmas": first.sigmas,
    }
    if first.negative is not None:
        asked["negative"] = [text for request in requests for text in request.negative or []]
    # None: the bundle has no experts, or no groups.
    knobs = (("top_k", first.top_k), ("kappa", first.kappa))
    return asked | {name: each for name, each in knobs if each[0] is not None}
