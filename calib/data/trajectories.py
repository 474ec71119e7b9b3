"""Data-free training data: latents that the dense model makes itself, on its way from noise.

For every prompt the teacher generates once, through its own pipeline, as the pipeline directory
says; what a student learns from are points of that way, with the times that the scheduler put them
at. The data are thus what both models meet when they generate. Letters: B batch, T image tokens, C
packed channels, S denoising steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.data.encoding_cache import cached, digest_of, key_of
from calib.data.encodings import Encoding, check_size, collate, text_encoder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

POINTS = 4  # ours: of one way, in neighbouring places of a batch: a way costs S runs of the teacher
ROUNDS = 8  # ours: epochs in which a prompt begins with other noise; then the cache has all of them
HELD = 2  # ways in memory: batches may end in the middle of one


def trajectory(
    pipe: DiffusionPipeline, text: Encoding, noise: Tensor, settings: Mapping[str, Any]
) -> Encoding:
    """The teacher's way from `noise` [T, C]: `states` [S + 1, T, C], the last one the latents of
    the image, and `times` [S + 1] from about 1, pure noise, to 0.

    text: of one prompt, as `calib.data.encodings.text_encoder` makes it; settings: the fields of
    `d2m.families.generation_defaults.generation_defaults`.
    """
    import torch

    from d2m.families import family_of_pipeline
    from d2m.families.inputs import generate_latents

    device = pipe.transformer.device
    states = [noise[None].to(device)]

    def keep(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(tensors["latents"].clone())
        return {}

    data, negative = family_of_pipeline(pipe).data, None
    if data.unconditional_of(pipe):
        negative = data.encode_text(pipe, [""], settings["max_sequence_length"])
    names = ("height", "width", "num_inference_steps", "guidance_scale")
    keywords = {name: settings[name] for name in names} | {"callback_on_step_end": keep}
    prompt = {name: tensor[None] for name, tensor in text.items()}
    generate_latents(pipe, states[0], prompt, negative, **keywords)
    return {"states": torch.cat(states).cpu(), "times": data.times(pipe.scheduler)}


def trajectory_decoder(
    pipe: DiffusionPipeline,
    seed: int,
    settings: Mapping[str, Any],
    cache: Path | None = None,
    log: Callable[[str], None] = print,
) -> Callable[[int, bytes, str], list[Encoding]]:
    """A function: (epoch, no bytes, prompt) -> POINTS samples of one trajectory, a pure one.

    A sample holds a prompt's text, `latents` [T, C] (where the way ends), `noisy` [T, C] and `time`
    (a point of the way), `guidance`. ValueError for a size that the pipeline cannot generate.
    """
    import torch

    from d2m.families import family_of_pipeline
    from d2m.families.flow import generator_at

    height, width = settings["height"], settings["width"]
    check_size(pipe, height, width)
    encode = text_encoder(pipe, settings["max_sequence_length"], cache, log)
    teacher = digest_of(pipe.transformer) if cache else ""
    scheduler = repr(sorted(pipe.scheduler.config.items(), key=lambda item: item[0]))
    family = family_of_pipeline(pipe)

    @torch.no_grad()
    def decode(epoch: int, nothing: bytes, prompt: str) -> list[Encoding]:
        text = encode(prompt)
        place = f"{seed}/{epoch % ROUNDS}"

        def compute() -> Encoding:
            generator = generator_at(seed, "way", place, prompt)
            noise = family.data.noise(pipe, height, width, generator).to(pipe.transformer.dtype)
            return trajectory(pipe, text, noise, settings)

        def key() -> str:
            return key_of(
                "way", teacher, scheduler, repr(sorted(settings.items())), place, prompt,
                *(text[name].float().numpy().tobytes() for name in sorted(text)),
            )  # fmt: skip

        way = cached(cache, "trajectories", key, compute, log)
        states, times = way["states"], way["times"]
        steps = len(states) - 1
        picks = random.Random(f"{seed}/{epoch}/{prompt}")
        chosen = picks.sample(range(steps), min(POINTS, steps))
        chosen += [picks.randrange(steps) for _ in range(POINTS - len(chosen))]
        guidance = torch.tensor(float(settings["guidance_scale"]))
        share = family.data.unconditional_of(pipe)
        none = encode("") if share else text
        texts = [none if picks.random() < share else text for _ in chosen]
        return [
            words
            | {"latents": states[-1], "noisy": states[i], "time": times[i], "guidance": guidance}
            for words, i in zip(texts, chosen, strict=True)
        ]

    return decode


def trajectory_batches(
    pipe: DiffusionPipeline,
    prompts: Callable[[int, int], list[list[Encoding]]],
    settings: Mapping[str, Any],
) -> Callable[[int, int], dict[str, Tensor]]:
    """A function (step, batch size) -> batch, of `calib.data.samples.feed` over a trajectory
    decoder.

    The batch is that of `calib.data.option.source_batches` with `noisy` [B, T, C], `time` [B] and
    `guidance` [B] besides.
    """
    ways: dict[int, list[Encoding]] = {}

    def batch(step: int, size: int) -> dict[str, Tensor]:
        first, last = step * size // POINTS, ((step + 1) * size - 1) // POINTS
        missing = [number for number in range(first, last + 1) if number not in ways]
        for number in missing:
            ways[number] = prompts(number, 1)[0]
        slots = range(step * size, (step + 1) * size)
        samples = [ways[slot // POINTS][slot % POINTS] for slot in slots]
        for number in sorted(ways)[:-HELD]:
            del ways[number]
        return collate(pipe, samples, settings["height"], settings["width"])

    return batch
