"""From how many rows on the size and the other rows of a batch no longer change an image.

A matmul of one row takes another routine than one of many, and experts run as many rows as chose
them: whether an image's bits depend on what else is in its batch is a property of backend, graphs
and shape. So it is tried: the same image in batches of several sizes, in other rows, beside other
images, compared bit by bit before rounding. Measured with the bundle that ships with d2m, ONNX
Runtime on x86-64: from two rows on nothing changes in its whole graph (weights packed), while block
sessions (top_k other than the default) give other bits beside other images.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.images.latents import ImageLatents, no_channels
from runtime.ort.component import Graph
from runtime.sampling import decode, denoise, encode, prepare_latents

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline
    from runtime.request import Request

log = logging.getLogger("runtime.serve")
STEPS = 2
TRIES = 4  # further batches of the largest size, with other images
MOST = 64  # shapes and knobs that are tried; later ones are generated alone
PROMPTS = ("a photo of a red circle", "two blue squares above a dog", "a", "", "five trees at dusk")


class MinBatches:
    """Rows by shape and number of experts, each tried at the first request of its kind."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._known: dict[tuple[Any, ...], int | None] = {}
        self._lock = threading.Lock()

    def of(self, request: Request) -> int | None:
        """The fewest rows for such requests; None where they must be generated alone."""
        if self.pipeline.max_batch < 2:
            return None
        rows: list[int | None] = []
        guided = request.negative is not None
        for top_k in sorted({-1 if k is None else k for k in request.top_k}):
            key = (request.latent_size, top_k, guided)
            with self._lock:
                if key not in self._known:
                    if len(self._known) >= MOST:
                        return None
                    value = None if top_k < 0 else top_k
                    size = request.latent_size
                    self._known[key] = find_min_batch(self.pipeline, size, value, guided)
                    log.info("%s", summary(request, top_k, self._known[key]))
                rows.append(self._known[key])
        known = [row for row in rows if row is not None]
        return max(known) if len(known) == len(rows) else None


def summary(request: Request, top_k: int, min_batch: int | None) -> str:
    """What was found, for the log."""
    what = f"{request.width} x {request.height}" + ("" if top_k < 0 else f", top_k {top_k}")
    if min_batch is None:
        return f"{what}: bits depend on the batch, requests are generated one by one"
    return f"{what}: batches of {min_batch} rows or more are shared, no bit depends on the others"


def find_min_batch(
    pipeline: Pipeline, latent_size: tuple[int, int], top_k: int | None, guided: bool = False
) -> int | None:
    """1, 2, or None: the fewest images from which on one image's bits are always the same.

    `guided`: every image has a row more, that of its negative prompt.
    """
    if pipeline.bundle.component("transformer").get("groups") and not runs_whole_graph(
        pipeline, top_k
    ):
        return None  # which samples run a block together depends on what they are
    most = pipeline.max_batch
    reference = sample(pipeline, latent_size, top_k, most, 0, guided)
    sizes = [2, *({3, most - 1, most} - {0, 1, 2, most + 1})]
    for turn, size in enumerate([*sizes, *[most] * TRIES], start=1):
        if not np.array_equal(sample(pipeline, latent_size, top_k, size, turn, guided), reference):
            return None
    alone = sample(pipeline, latent_size, top_k, 1, 0, guided)
    return 1 if np.array_equal(alone, reference) else 2


def runs_whole_graph(pipeline: Pipeline, top_k: int | None) -> bool:
    """Whether ONNX Runtime's whole graph runs, where a block runs for all rows or for none.

    Block sessions and plans run a block of a group with the rows alone that chose it.
    """
    executor = pipeline.executor("transformer")
    if not isinstance(executor, Graph) or executor.adapted:
        return False
    return top_k in (None, executor.default)


def sample(
    pipeline: Pipeline,
    latent_size: tuple[int, int],
    top_k: int | None,
    size: int,
    turn: int,
    guided: bool = False,
) -> np.ndarray:
    """Pixels of one and the same image, [3, H, W], from a batch that `turn` and `size` decide."""
    random = np.random.default_rng([size, turn])
    row = int(random.integers(size))
    prompts = [PROMPTS[int(i)] for i in random.integers(len(PROMPTS), size=size)]
    seeds = [1000 + int(i) for i in random.integers(1000, size=size)]
    prompts[row], seeds[row] = PROMPTS[0], 0
    negative = [PROMPTS[int(i)] for i in random.integers(1, len(PROMPTS), size=size)]
    negative[row] = PROMPTS[1]
    encoded = encode(pipeline, [*prompts, *negative] if guided else prompts)
    noise = prepare_latents(pipeline, seeds, latent_size)
    latents = denoise(
        pipeline,
        noise,
        {name: array[:size] for name, array in encoded.items()},
        negative={name: array[size:] for name, array in encoded.items()} if guided else None,
        latent_size=latent_size,
        top_k=[top_k] * STEPS,
        guidance=pipeline.manifest["defaults"]["guidance"],
        images=ImageLatents(channels=no_channels(pipeline.manifest, noise)),
    )
    pixels: np.ndarray = decode(pipeline, latents, latent_size)[row]
    return pixels
