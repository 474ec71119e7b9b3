"""Ray Serve generates from a bundle, a replica per GPU: serve run docs.ray_serve:app

D2M_BUNDLE names the bundle (the embedded one by default), D2M_GPUS the GPUs of a replica (0),
D2M_REPLICAS how many replicas there are (1).
"""

from __future__ import annotations

import asyncio
import json
import os

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

KNOBS = {"seed", "steps", "guidance", "height", "width", "top_k", "kappa", "sigmas", "negative"}


@serve.deployment(
    num_replicas=int(os.environ.get("D2M_REPLICAS", "1")),
    ray_actor_options={"num_gpus": float(os.environ.get("D2M_GPUS", "0"))},
    max_ongoing_requests=4,
    max_queued_requests=64,  # more are answered with 503
)
class Generator:
    """One bundle; a replica generates one image at a time."""

    def __init__(self, bundle: str | None) -> None:
        import runtime

        self.pipeline = runtime.load(bundle)
        self.pipeline.warm()
        self.turn = asyncio.Lock()

    async def __call__(self, request: Request) -> Response:
        """{"prompt": "...", "seed": 0, ...} -> a PNG, or one sentence with status 400."""
        from runtime.image import to_png

        try:
            asked = json.loads(await request.body())
            knobs = {name: value for name, value in asked.items() if name in KNOBS}
            async with self.turn:
                image = await asyncio.to_thread(self.pipeline, str(asked["prompt"]), **knobs)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return Response(str(error), 400)
        return Response(to_png(image), media_type="image/png")


app = Generator.bind(os.environ.get("D2M_BUNDLE"))
