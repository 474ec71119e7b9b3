"""What a family of models is to the runtime: its components, and numpy functions around them.

A row stands in a file of its own, `runtime/families/NAME.py`, with the functions it names
(docs/families.md). Letters: n images, C latent channels, h x w latent pixels, T tokens.
`latents` [n, ...] are of the shape that the family denoises: FLUX's are packed, SD3's [n, C, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.families.flow_matching import check_scheduler, noised, sampler
from runtime.families.latents import (
    Settings,
    Size,
    Step,
    patches,
    scaled,
    spatial_noise,
    unpatchify,
)
from runtime.files.checked_json import wrong

Arrays = Mapping[str, np.ndarray]
Run = Callable[[str, str, Sequence[str]], dict[str, np.ndarray]]
MAX_SIDE = 16384  # pixels, where a model's positions have no end


def rows(conditions: Arrays) -> int:
    """How many rows conditions have."""
    return len(next(iter(conditions.values())))


def guide(sample: np.ndarray, guidance: float) -> np.ndarray:
    """Classifier-free guidance: [2 n, ...], the negative prompts' rows first -> [n, ...]."""
    without, with_prompt = np.split(sample, 2)
    guided: np.ndarray = without + np.float32(guidance) * (with_prompt - without)
    return guided


def no_reference_size(manifest: Mapping[str, Any], height: int, width: int) -> tuple[Size, Size]:
    """Of a family that sees no references: never asked for."""
    raise AssertionError(manifest["family"])


def check_masked_text(manifest: Mapping[str, Any]) -> None:
    """ValueError (a clause) unless the text encoder gives its mask beside its states."""
    outputs = manifest["components"]["text_encoder"]["outputs"]
    if set(outputs) != {"states", "mask"}:
        raise wrong("components.text_encoder.outputs", sorted(outputs), "mask and states")


@dataclass(frozen=True)
class Family:
    """A row of runtime/families/known.py.

    name: as manifests have it; components: of a bundle, in the order in which an image needs them,
    each with the number of its outputs (0: any); tokenizers: their names; guided: generates with
    classifier-free guidance, so that a negative prompt has a meaning and guidance over 1 runs the
    transformer on two rows an image (a manifest's `guided` goes before: see `is_guided`).

    title: for people; classes: of its transformer, by which a pipeline directory is known.
    title_of(config): the title of one model, by its transformer's config.
    check(manifest): ValueError (a clause) where `latents` or `scheduler` cannot be used.
    largest(manifest): the longest side in pixels that the model takes.
    with_template(prompt): the text that tokenizers get, for models that read a template around it;
        dropped: tokens at its beginning that the transformer does not get.
    encode(run, prompts): the transformer's conditions [n, ...] by the names of its inputs; `run`
        (component, tokenizer, prompts) gives a text encoder's outputs, and where the family is
        `masked` the tokenizer's `mask` [n, tokens] int64, 1 where a text is and 0 behind it.
    noise(seeds, channels, h, w): initial latents, one stream a seed.
    layouts(images, channels, h, w): the shapes that given latents may have, the family's own first;
    arrange(latents): one of the others -> its own.
    residuals(blocks, residuals): of a ControlNet, which of its residuals is added behind each block
        of a list, None for none; None where no ControlNets of the family are known.
    check_scheduler(scheduler): ValueError, a sentence, for a config that is not supported.
    sigmas(scheduler, steps, T, given): noise levels [steps + 1].
    sampler(scheduler, noise levels): the step of one generation, (index, latents, prediction as
        latents) -> the next latents; asked in order, so that it may remember.
    noised(latents, noise, noise level): latents with noise, where a generation starts or a mask
        keeps them.
    inputs(manifest, conditions, (h, w), guidance): the transformer's inputs that are the same in
        every step, for as many rows as `conditions` have.
    timesteps(scheduler, noise levels [S]): its input `timestep` at each of them, [S].
    tokens(latents, settings): hidden_states [n, T, channels].
    guide(sample [2 n, T, channels], guidance): what the model says of both -> one, [n, ...].
    velocity(sample, settings, (h, w)): the transformer's output as latents (or noise, as `sampler`
        takes it).
    references(manifest): how many images the model may see beside the noise.
    reference_size(manifest, height, width): what such an image is resized to, and the height and
        width of the middle that is kept of it; ValueError, a sentence, for one of no use.
    reference_place: where the first stands on the first axis of positions; the others at its
        multiples.
    image_latents(latents, settings, (h, w)): [n, C, h, w] as the VAE decodes them;
    encoded(latents [n, C, h, w] as the VAE encodes them, settings): the inverse.
    """

    name: str
    components: Mapping[str, int]
    tokenizers: tuple[str, ...]
    title: str
    classes: tuple[str, ...]
    title_of: Callable[[Mapping[str, Any]], str]
    check: Callable[[Mapping[str, Any]], None]
    encode: Callable[[Run, Sequence[str]], dict[str, np.ndarray]]
    sigmas: Callable[[dict[str, Any], int, int, Sequence[float] | None], np.ndarray]
    inputs: Callable[[Mapping[str, Any], Arrays, Size, float], dict[str, np.ndarray]]
    timesteps: Callable[[dict[str, Any], np.ndarray], np.ndarray]
    image_latents: Callable[[np.ndarray, Settings, Size], np.ndarray]
    # What follows fits latents [n, C, h, w] under flow matching.
    encoded: Callable[[np.ndarray, Settings], np.ndarray] = scaled
    noise: Callable[[Sequence[int], int, int, int], np.ndarray] = spatial_noise
    layouts: Callable[[int, int, int, int], tuple[tuple[int, ...], ...]] = lambda *shape: (shape,)
    arrange: Callable[[np.ndarray], np.ndarray] = lambda latents: latents
    tokens: Callable[[np.ndarray, Settings], np.ndarray] = patches
    velocity: Callable[[np.ndarray, Settings, Size], np.ndarray] = unpatchify
    guided: bool = False
    references: Callable[[Mapping[str, Any]], int] = lambda manifest: 0
    reference_size: Callable[[Mapping[str, Any], int, int], tuple[Size, Size]] = no_reference_size
    reference_place: int = 0
    largest: Callable[[Mapping[str, Any]], int] = lambda manifest: MAX_SIDE
    guide: Callable[[np.ndarray, float], np.ndarray] = guide
    with_template: Callable[[str], str] = str
    masked: bool = False
    dropped: int = 0
    residuals: Callable[[int, int], Sequence[int | None]] | None = None
    check_scheduler: Callable[[dict[str, Any]], None] = check_scheduler
    sampler: Callable[[dict[str, Any], np.ndarray], Step] = sampler
    noised: Callable[[np.ndarray, np.ndarray, np.floating], np.ndarray] = noised
