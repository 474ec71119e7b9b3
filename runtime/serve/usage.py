"""What a request runs of a model: blocks and experts, from the manifest and its knobs alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.arguments import Request

BLOCK = re.compile(r"\w+\.\d+\.")  # the weight prefix of a block, not of the transformer's ends


def usage(manifest: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """Blocks that one image runs over all steps, of how many there are, and experts per token.

    Groups of blocks keep kappa of their blocks in every step; all others run.
    """
    component = manifest["components"]["transformer"]
    places = [i for i, call in enumerate(component["program"]) if BLOCK.match(call["prefix"])]
    grouped = [group["calls"] for group in component.get("groups", {}).values()]
    steps = len(request.top_k)
    run = 0
    for kappa in request.kappa:
        left_out = [len(calls) - kappa for calls in grouped if kappa is not None]
        run += len(places) - sum(max(0, count) for count in left_out)
    top_k = list(request.top_k)
    return {
        "blocks": run,
        "blocks_of": len(places) * steps,
        "experts_per_token": top_k[0] if len(set(top_k)) == 1 else top_k,
        "experts_of": manifest.get("num_experts") if top_k[0] is not None else None,
    }
