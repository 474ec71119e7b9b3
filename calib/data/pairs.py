"""Pictures before and after an edit as the transformer of an editing pipeline takes them.

One sample at a time, as in encodings.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from calib.data.encoding_cache import cached, digest_of, key_of
from calib.data.encodings import HOW, Encoding, check_size
from calib.data.pixels import pixels
from calib.data.source import Pair
from d2m.families import family_of_pipeline
from d2m.families.latents import changed_boxes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

WHITE = 128  # of 255: a mask's pixels from here on are to be painted


def pair_encoder(
    pipe: DiffusionPipeline,
    height: int,
    width: int,
    cache: Path | None = None,
    log: Callable[[str], None] = print,
) -> Callable[[Pair], Encoding]:
    """A function: the files of an edit -> `latents` of the picture after and what the family's
    `encode_given` makes of the one before, of one sample, on the CPU.

    calib.data.source.Damaged if one of them is no picture.
    """
    import torch

    check_size(pipe, height, width)
    encoder = digest_of(pipe.vae) if cache else ""
    data = family_of_pipeline(pipe).data
    given = data.encode_given
    assert given is not None, type(pipe)

    def shown(file: bytes) -> Tensor:
        return torch.from_numpy(pixels(file, height, width))[None]

    @torch.no_grad()
    def encode(pair: Pair) -> Encoding:
        def compute() -> Encoding:
            before, after = (shown(file) for file in (pair.before, pair.after))
            mask = changed_boxes(before, after)
            if pair.mask is not None:
                mask = shown(pair.mask).amax(-1) >= WHITE
            found = {name: each[0] for name, each in given(pipe, before, mask).items()}
            return found | {"latents": data.encode_images(pipe, after)[0]}

        key = partial(
            key_of, "pair", HOW, type(pipe).__name__, encoder, pair.before, pair.after,
            pair.mask or b"", height, width,
        )  # fmt: skip
        return cached(cache, "latents", key, compute, log)

    return encode
