"""Generate from a world's captions, batch by batch, and judge every image."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from PIL import Image

# (prompts, seeds) -> images; of a suite of edits (prompts, seeds, images before) -> images
Generate = Callable[..., Sequence[Image.Image]]
Progress = Callable[[int, int], None]


class Captioned(Protocol):
    """A scene of any world."""

    @property
    def category(self) -> str: ...

    @property
    def caption(self) -> str: ...


class Judged(Protocol):
    """A verdict of any world; reason: why not ok."""

    @property
    def ok(self) -> bool: ...

    @property
    def reason(self) -> str: ...


S = TypeVar("S", bound=Captioned)
V = TypeVar("V", bound=Judged)


@dataclass(frozen=True)
class Sample(Generic[S, V]):
    """One prompt of a suite: scene, seed, the image (uint8 [S, S, 3]) and the verdict.

    before: of an edit, the image that was given.
    """

    scene: S
    seed: int
    image: np.ndarray
    verdict: V
    before: np.ndarray | None = None


def judged(
    generate: Generate,
    scenes: Sequence[S],
    seed: int,
    size: int,
    judge: Callable[[np.ndarray, S], V],
    batch: int,
    progress: Progress | None = None,
    before: Callable[[S], Image.Image] | None = None,
) -> tuple[list[Sample[S, V]], float]:
    """All samples in order, and the seconds inside `generate`.

    before(scene): the image that `generate` is given besides, for suites of edits.

    Prompt i gets image seed `seed * 1_000_000 + i`, whatever the batch, so that two models see
    the same captions and noise. `progress(done, n)` is called after every batch. Raises ValueError
    if batch is not positive, or if `generate` returns another number of images or another size.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    samples: list[Sample[S, V]] = []
    seconds = 0.0
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        seeds = [seed * 1_000_000 + start + i for i in range(len(part))]
        given = [before(scene) for scene in part] if before else [None] * len(part)
        started = time.perf_counter()
        captions = [scene.caption for scene in part]
        images = generate(captions, seeds, given) if before else generate(captions, seeds)
        seconds += time.perf_counter() - started
        if len(images) != len(part):
            raise ValueError(f"generate returned {len(images)} images for {len(part)} prompts")
        for scene, image_seed, generated, shown in zip(part, seeds, images, given):
            image = _pixels(generated, size)
            old = None if shown is None else np.asarray(shown)
            samples.append(Sample(scene, image_seed, image, judge(image, scene), old))
        if progress:
            progress(len(samples), len(scenes))
    return samples, seconds


def _pixels(image: Image.Image, size: int) -> np.ndarray:
    if image.size != (size, size):
        width, height = image.size
        raise ValueError(
            f"generate returned an image of {width} x {height} pixels, the world's are "
            f"{size} x {size}; generate at that size or evaluate with World(size={height})"
        )
    return np.asarray(image.convert("RGB"))
