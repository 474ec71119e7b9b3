"""From prompts to pixels on an opened bundle: encode, noise, denoise step by step, decode.

    conditions = encode(model, prompts)            # [n, ...] by name
    noise = prepare_latents(model, seeds, size)
    latents = denoise(model, noise, conditions, latent_size=size, top_k=[2] * 8, guidance=3.5)
    pixels = decode(model, latents, size)          # [n, 3, H, W], about -1 to 1

`generate_batch` is all of it for a batch of a checked request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from runtime.bundle.block_groups import can_forecast
from runtime.control.steps import ControlSteps
from runtime.families.family import Arrays, rows
from runtime.families.flux2 import STATES
from runtime.families.latents import image_tokens, rope
from runtime.images.given import check_encoder
from runtime.images.latents import NO_IMAGES, ImageLatents, image_latents, no_channels
from runtime.images.references import reference_tokens
from runtime.opened import Opened
from runtime.program.block_forecast import forecast
from runtime.program.step_cache import StepCache
from runtime.request import Request

Progress = Callable[[str, int, int], None]
StepCallback = Callable[[int, int, np.ndarray], None]


class Settable(Protocol):
    """What threading.Event and multiprocessing's have in common."""

    def is_set(self) -> bool:
        """Whether it was set."""


Cancel = Callable[[], bool] | Settable


class Cancelled(Exception):
    """Generating was stopped, because `cancel` was set or returned True."""


def generate_batch(
    model: Opened,
    request: Request,
    part: slice,
    noise: np.ndarray | None,
    progress: Progress | None = None,
    callback: StepCallback | None = None,
    cancel: Cancel | None = None,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Pixels [n, 3, H, W] of the images `part` of a checked request, and how each was made.

    noise: [n, ...], or None for that of the request's seeds.
    """

    cancelled: Any = getattr(cancel, "is_set", cancel)  # a function, or None

    def report(phase: str, done: int, total: int) -> None:
        if cancelled is not None and cancelled():
            raise Cancelled("generating was cancelled.")
        if progress:
            progress(phase, done, total)

    prompts, start, total = request.prompts[part], part.start, len(request.prompts)
    end = start + len(prompts)

    def step(index: int, steps: int) -> None:
        report("denoise", start * steps + index * len(prompts), total * steps)

    def after(index: int, steps: int, latents: np.ndarray) -> None:
        if callback:
            callback(index, steps, latents[: len(prompts)])

    # Where fewer images than min_batch are left, the batch is filled up with copies of its last
    # row, which are thrown away at the end.
    count = max(len(prompts), model.min_batch)
    rows = np.minimum(np.arange(count), len(prompts) - 1)
    report("encode", start, total)
    negative_prompts = None if request.negative is None else request.negative[part]
    conditions, negative = encode_pairs(model, prompts, negative_prompts, rows)
    settings = model.manifest["latents"]
    images = image_latents(
        request.images, part, model.family, settings, lambda pixels: encode_image(model, pixels)
    ).take(rows)
    report("encode", end, total)
    if noise is None:
        seeds = [seed for seed in request.seeds[part] if seed is not None]
        noise = prepare_latents(model, seeds, request.latent_size)
    method, component = request.cache, model.bundle.component("transformer")
    tokens = image_tokens(settings, request.latent_size)
    cache = StepCache(method, component, tokens) if method.skips else None
    latents = denoise(
        model,
        noise[rows],
        conditions,
        negative=negative,
        latent_size=request.latent_size,
        top_k=request.top_k,
        kappa=request.kappa,
        guidance=request.guidance,
        sigmas=request.sigmas,
        images=images,
        controls=control_steps(model, request, part, rows),
        start=request.images.first_step(len(request.top_k)),
        cache=cache,
        step=step,
        after=after,
    )
    report("decode", start, total)
    pixels = decode(model, latents, request.latent_size)[: len(prompts)]
    report("decode", end, total)
    common = {
        "backend": model.backend,
        "name": model.bundle.name,
        "bundle": model.bundle.digest,
        # Whoever sets min_batch has measured that more rows change nothing, so an image depends
        # on it alone; without it, on the rows that were in its batch.
        "batch": model.min_batch or count,
    }
    if model.loras:
        common["loras"] = [each.row() for each in model.loras]
    made = [request.settings(index) | common for index in range(start, end)]
    if cache is not None:
        # A mean over an image's rows, of which guidance by a negative prompt makes two.
        skipped = cache.skipped.reshape(-1, count).mean(0).tolist()
        made = [row | {"steps_skipped": n} for row, n in zip(made, skipped)]
    return pixels, made


def encode(model: Opened, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Prompts -> the transformer's conditions [n, ...] by name, float32."""

    def run(component: str, tokenizer: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
        ids, mask = model.tokenizers[tokenizer].tokens(list(map(model.family.with_template, texts)))
        given: Any = ids  # of a component with one input, whatever its name
        if "attention_mask" in model.bundle.component(component)["inputs"]:
            given = {"input_ids": ids, "attention_mask": mask}
        outputs = model.execute(component, given)
        return outputs | {"mask": mask} if model.family.masked else outputs

    return model.family.encode(run, prompts)


def encode_pairs(
    model: Opened, prompts: Sequence[str], negative: Sequence[str] | None, rows: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """Conditions of prompts and of negative ones, every text encoded once.

    rows: which of `prompts` each row of the batch has, [rows].
    """
    different = list(dict.fromkeys([*prompts, *(negative or ())]))
    # Two texts where there is a negative one, even where it is the same: one row alone takes
    # other routines, so an image would depend on the texts of others in its batch.
    least = max(model.min_batch, 2 if negative else 1)
    encoded = encode(model, [*different, *different[-1:] * (least - len(different))])

    def of(texts: Sequence[str]) -> dict[str, np.ndarray]:
        indices = np.array([different.index(text) for text in texts])[rows]
        return {name: array[indices] for name, array in encoded.items()}

    return of(prompts), of(negative) if negative else None


def prepare_latents(
    model: Opened, seeds: Sequence[int], latent_size: tuple[int, int]
) -> np.ndarray:
    """Initial latents of the family's shape, one stream a seed."""
    return model.family.noise(seeds, model.manifest["latents"]["channels"], *latent_size)


def noise_levels(
    model: Opened, steps: int, latent_size: tuple[int, int], given: Sequence[float] | None = None
) -> np.ndarray:
    """The noise levels [steps + 1] of the bundle's scheduler, or those that follow `given`."""
    tokens = image_tokens(model.manifest["latents"], latent_size)
    return model.family.sigmas(model.manifest["scheduler"], steps, tokens, given)


def denoise(
    model: Opened,
    noise: np.ndarray,
    conditions: Arrays,
    *,
    latent_size: tuple[int, int],
    top_k: Sequence[int | None],
    guidance: float,
    negative: Arrays | None = None,
    kappa: Sequence[int | None] | None = None,
    sigmas: Sequence[float] | None = None,
    images: ImageLatents = NO_IMAGES,
    controls: ControlSteps | None = None,
    start: int = 0,
    cache: StepCache | None = None,
    step: Callable[[int, int], None] | None = None,
    after: StepCallback | None = None,
) -> np.ndarray:
    """Noise [n, ...] -> latents, one step of the family's sampler per entry of `top_k`.

    `conditions` as `encode` gives them, [n, ...]; `negative` the same of negative prompts, for
    classifier-free guidance (both run together, its rows first). `latent_size` is (h, w) in
    latent pixels; `kappa` has an entry per step, None throughout means the bundle's; `sigmas`
    see `Pipeline.__call__`; `images`: those that are denoised instead of noise alone, from the step
    `start` on, as a mask or more channels of theirs say; `controls`: what ControlNets add;
    `cache`: a new one, which may leave steps out; `step(done, steps)` is called before the first
    step and after each, `after(done, steps, latents)` after each, both of the steps that are taken.
    """
    steps, taken = len(top_k), len(top_k) - start
    images = with_states(model, images, top_k[0])
    kappa = [model.manifest.get("kappa")] * steps if kappa is None else kappa
    levels = noise_levels(model, steps, latent_size, sigmas)
    advance = model.family.sampler(model.manifest["scheduler"], levels)
    if negative is not None:
        conditions = {
            name: np.concatenate([negative[name], array]) for name, array in conditions.items()
        }
    feeds = step_inputs(model, noise, conditions, levels[:-1], latent_size, guidance, images)
    feeds = feeds[start:]
    executor, component = model.executor("transformer"), model.bundle.component("transformer")
    starts: list[Any] = [None] * taken
    if can_forecast(component) and hasattr(executor, "block"):
        # Whole graphs have no `block`: their routers are in them.
        starts = list(forecast(component, executor.block, map(model.cast, feeds), kappa[start:]))
    clean, latents = images.image, noise
    if clean is not None:
        latents = model.family.noised(clean, noise, levels[start])
    for index, feed in enumerate(feeds, start):
        if step:
            step(index - start, taken)
        inputs = feed | {"hidden_states": hidden_states(model, latents, rows(conditions), images)}
        if model.step_hook:
            model.step_hook(inputs, top_k[index], kappa[index])
        if cache is not None:
            cache.begin(levels[index])
        added = None
        if controls is not None and not (cache is not None and cache.idle):
            added = controls.at(index - start, taken, inputs)
        knobs = top_k[index], kappa[index], starts[index - start], cache, added
        (sample,) = model.execute("transformer", inputs, *knobs).values()
        if images.references is not None:
            sample = sample[:, : image_tokens(model.manifest["latents"], latent_size)]
        if negative is not None:
            sample = model.family.guide(sample, guidance)
        velocity = model.family.velocity(sample, model.manifest["latents"], latent_size)
        latents = advance(index, latents, velocity)
        if images.mask is not None and clean is not None:
            kept = model.family.noised(clean, noise, levels[index + 1])
            latents = (1 - images.mask) * kept + images.mask * latents
        if after:
            after(index + 1 - start, taken, latents)
    if step:
        step(taken, taken)
    return latents


def hidden_states(
    model: Opened, latents: np.ndarray, count: int, images: ImageLatents = NO_IMAGES
) -> np.ndarray:
    """hidden_states [count, T, C] of latents [n, ...], repeated for every n rows.

    images: whose channels stand beside those of the latents, whose references behind their tokens.
    """
    tokens = model.family.tokens(latents, model.manifest["latents"])
    if images.channels is not None:
        tokens = np.concatenate([tokens, images.channels], axis=-1)
    if images.references is not None:
        tokens = images.references.behind(tokens)
    return tokens if len(tokens) == count else np.tile(tokens, (count // len(tokens), 1, 1))


def step_inputs(
    model: Opened,
    noise: np.ndarray,
    conditions: Arrays,
    sigmas: np.ndarray,
    latent_size: tuple[int, int],
    guidance: float,
    images: ImageLatents = NO_IMAGES,
) -> list[dict[str, np.ndarray]]:
    """The transformer's inputs for every step, all with the noise as hidden_states."""
    hidden = hidden_states(model, noise, rows(conditions), images)
    inputs = model.family.inputs(model.manifest, conditions, latent_size, guidance)
    if images.states is not None:
        inputs[STATES] = np.repeat(images.states, len(hidden), axis=0)
    if images.references is not None:
        inputs = images.references.placed(inputs, model.manifest["latents"])
    times = model.family.timesteps(model.manifest["scheduler"], sigmas)
    each = (np.full(len(hidden), time, np.float32) for time in times)
    return [{"hidden_states": hidden, **inputs, "timestep": timestep} for timestep in each]


def with_states(model: Opened, images: ImageLatents, top_k: int | None) -> ImageLatents:
    """`images` with the keys and values of references in place of their tokens, where the model
    keeps them: they are the same in every step."""
    if STATES not in model.manifest["components"]:
        return images
    seen, settings = images.references, model.manifest["latents"]
    if seen is None:
        _, blocks, _, width = model.bundle.component("transformer")["inputs"][STATES]["shape"]
        return replace(images, states=np.zeros((1, blocks, 0, width), np.float32))
    cos, sin = rope(seen.positions, settings["rope_axes"], settings["rope_theta"])
    inputs = {"hidden_states": seen.tokens, "timestep": np.zeros(1, np.float32)}
    inputs |= {"rope_cos": cos, "rope_sin": sin}
    (states,) = model.execute(STATES, inputs, top_k).values()
    return replace(images, references=None, states=states)


def request_inputs(model: Opened, request: Request) -> list[dict[str, np.ndarray]]:
    """The transformer's inputs in every step of a request, in its dtypes; noise of seed 0."""
    size = request.latent_size
    sigmas = noise_levels(model, len(request.top_k), size)[:-1]
    noise, conditions = prepare_latents(model, [0], size), encode(model, request.prompts[:1])
    encoded = partial(encode_image, model)
    settings, seen = model.manifest["latents"], request.images.references
    images = ImageLatents(
        channels=no_channels(model.manifest, noise),
        references=reference_tokens(seen, model.family, settings, encoded),
    )
    images = with_states(model, images, request.top_k[0])
    feeds = step_inputs(model, noise, conditions, sigmas, size, request.guidance, images)
    return [model.cast(feed) for feed in feeds]


def encode_image(
    model: Opened, pixels: np.ndarray, settings: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Pixels [n, 3, H, W], -1 to 1 -> latents as the family denoises them, without noise.

    The mean of what the VAE gives, not a sample. One image at a time, so that it does not depend on
    others of its batch. settings: the manifest's `latents`, or others. ValueError where the bundle
    has no VAE encoder.
    """
    check_encoder(model.manifest, f"bundle {model.bundle.path}")
    found: list[np.ndarray] = []
    for index in range(len(pixels)):
        if index and np.array_equal(pixels[index], pixels[index - 1]):
            found.append(found[-1])
        else:
            row = np.ascontiguousarray(pixels[index : index + 1])
            (latents,) = model.execute("vae_encoder", row).values()
            found.append(model.family.encoded(latents, settings or model.manifest["latents"]))
    return np.concatenate(found)


def control_steps(
    model: Opened, request: Request, part: slice, rows: np.ndarray
) -> ControlSteps | None:
    """The ControlNets of a request for `rows` of its images `part`; None without any."""
    if not request.controls:
        return None
    settings, tokens = model.manifest["latents"], []
    for control in request.controls:
        encoded = encode_image(model, control.pixels[part], control.net.settings(settings))
        tokens.append(model.family.tokens(encoded, settings)[rows])
    return ControlSteps(request.controls, tokens, model.control_executor, request.guidance)


def decode(model: Opened, latents: np.ndarray, latent_size: tuple[int, int]) -> np.ndarray:
    """Latents -> pixels [n, 3, H, W], float32, about -1 to 1."""
    latents = model.family.image_latents(latents, model.manifest["latents"], latent_size)
    (pixels,) = model.execute("vae_decoder", latents).values()
    return pixels
