"""What a teacher learns: a world, as the stages see it, and the networks' sizes that fit it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

WORLDS = ("shapes", "emoji")


class Captioned(Protocol):
    """A scene of any world."""

    @property
    def caption(self) -> str: ...


@dataclass(frozen=True)
class Subject:
    """A world and its networks.

    size: side of an image in pixels. length: text tokens, CLIP's two marks among them. words: all
    that captions have. draw(n, seed): scenes of the training split. pictures(scenes, seed): the
    distinct images of the scenes, uint8 [M, 3, S, S], and every scene's among them, int64 [N].
    attributes(scene): what its caption says, one class each of as many as `classes` counts; None
    stands for the empty caption. tokens(scene): what each text token must know of it, `length` rows
    of one class each of as many as `token_classes` counts. labels(scenes, seed): what each 2 x 2
    patch of latents shows, int64 [N, T, L], of `label_classes`, for the images of `pictures`.
    """

    name: str
    size: int
    length: int
    words: Sequence[str]
    draw: Callable[[int, int], Sequence[Captioned]]
    pictures: Callable[[Sequence[Any], int], tuple[Tensor, Tensor]]
    classes: tuple[int, ...]
    attributes: Callable[[Any], list[int]]
    token_classes: tuple[int, ...]
    tokens: Callable[[Any], list[list[int]]]
    label_classes: tuple[int, ...]
    labels: Callable[[Sequence[Any], int], Tensor]
    vae: dict[str, Any] = field(default_factory=dict)  # of AutoencoderKL, over the defaults
    transformer: dict[str, Any] = field(default_factory=dict)  # of FluxTransformer2DModel, likewise
    vae_batch: int = 64  # images per step
    captions: int = 20_000  # that the text encoders learn from
    label_weight: float = 0.2  # of a patch's names against the velocity's error


def subject_named(name: str, size: int | None) -> Subject:
    """The subject of that name at a size in pixels (None: its own); ValueError for another."""
    if name == "shapes":
        from calib.shapes.world import World
        from scripts.teacher.scenes import shapes_subject

        return shapes_subject(World(size=size or 32))
    if name == "emoji":
        from calib.emoji.world import World as EmojiWorld
        from scripts.teacher.emoji import emoji_subject

        world = EmojiWorld()
        if size not in (None, world.size):
            raise ValueError(f"--size is {size}, but the emoji world has {world.size} pixels only")
        return emoji_subject(world)
    raise ValueError(f"--world is {name!r}, expected {' or '.join(WORLDS)}")
