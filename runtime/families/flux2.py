"""FLUX.2 [klein] and [dev] in the runtime: what Flux2KleinPipeline and Flux2Pipeline do around
their models.

Read: diffusers 0.42. [dev]'s transformer has an input `guidance`, [klein]'s has none; [klein] base
is guided by a negative prompt, as its manifest says. Letters: n images, C latent channels, h x w
latent pixels, T = (h / 2)(w / 2) tokens, L text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.families import flow_matching
from runtime.families import latents as shared
from runtime.families.family import Arrays, Family, Run, rows
from runtime.families.latents import Settings, Size
from runtime.files.checked_json import mapping, wrong

# read: compute_empirical_mu, lines through image tokens at 10 steps and at 200 (slope, height);
# above so many tokens the second one holds for any number of steps
AT_10, AT_200, MANY = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666), 4300

# The component that writes the keys and values of reference tokens, and its output, which is an
# input of the transformer: of a bundle whose model keeps them from step to step.
STATES = "references"
REFERENCES = 10  # at once, as many as [dev]'s makers name
LARGEST = 4096  # tokens of one; read: a larger one is made 1024 x 1024 pixels, in tokens of 16 x 16


def title_of(config: Mapping[str, Any]) -> str:
    """FLUX.2 [dev] or FLUX.2 [klein], by the guidance embedding."""
    return f"FLUX.2 [{'klein' if config.get('guidance_embeds') is False else 'dev'}]"


def check(manifest: Mapping[str, Any]) -> None:
    """ValueError (a clause) unless there are four rotary axes, a mean and deviation a channel."""
    shared.check_packed(manifest, 4)
    shared.check_statistics(manifest, 4 * mapping(dict(manifest), "latents")["channels"])
    components = manifest["components"]
    kept = components["transformer"]["inputs"].get(STATES)
    written = components.get(STATES, {}).get("outputs", {})
    if (kept is None) != (STATES not in components) or (kept and set(written) != {STATES}):
        raise wrong(f"components.{STATES}", sorted(written), f"{STATES}, as the transformer reads")
    if kept and (len(kept["shape"]) != 4 or type(kept["shape"][1]) is not int):
        raise wrong(f"components.transformer.inputs.{STATES}", kept["shape"], "four dimensions")


def encode(run: Run, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """States of three layers side by side [n, L, joint width], of the padding too."""
    return {"encoder_hidden_states": run("text_encoder", "tokenizer", prompts)["states"]}


def shift_mu(config: dict[str, Any], image_tokens: int, steps: int) -> float:
    """The shift for an image of `image_tokens` in `steps` steps."""
    at_10, at_200 = (slope * image_tokens + height for slope, height in (AT_10, AT_200))
    if image_tokens > MANY:
        return at_200
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


def sigmas(
    config: dict[str, Any], steps: int, image_tokens: int, given: Sequence[float] | None = None
) -> np.ndarray:
    """Noise levels [steps + 1] with FLUX.2's own shift; see flow_matching.sigmas."""
    return flow_matching.sigmas(config, steps, image_tokens, given, shift_mu)


def position_ids(text_tokens: int, size: Size) -> np.ndarray:
    """Positions [L + T, 4], text first: (0, 0, 0, place) and (0, row, column, 0)."""
    height, width = (side // 2 for side in size)
    text = np.zeros((text_tokens, 4), np.float32)
    text[:, 3] = np.arange(text_tokens)
    image = np.zeros((height, width, 4), np.float32)
    image[..., 1] = np.arange(height)[:, None]
    image[..., 2] = np.arange(width)[None, :]
    return np.concatenate([text, image.reshape(-1, 4)])


def inputs(
    manifest: Mapping[str, Any], conditions: Arrays, latent_size: Size, guidance: float
) -> dict[str, np.ndarray]:
    """See runtime.families.family; guidance is an input where the model embeds it."""
    settings = manifest["latents"]
    positions = position_ids(conditions["encoder_hidden_states"].shape[1], latent_size)
    cos, sin = shared.rope(positions, settings["rope_axes"], settings["rope_theta"])
    found = {**conditions, "rope_cos": cos, "rope_sin": sin}
    if "guidance" in manifest["components"]["transformer"]["inputs"]:
        found["guidance"] = np.full(rows(conditions), guidance, np.float32)
    return found


def image_latents(latents: np.ndarray, settings: Settings, latent_size: Size) -> np.ndarray:
    """Packed latents -> [n, C, h, w], by the mean and deviation of every packed channel."""
    mean, std = (np.array(settings[name], np.float32) for name in ("mean", "std"))
    return shared.unpack(latents * std + mean, *latent_size)


def encoded(latents: np.ndarray, settings: Settings) -> np.ndarray:
    """Encoded latents [n, C, h, w] -> packed, the inverse of `image_latents`."""
    mean, std = (np.array(settings[name], np.float32) for name in ("mean", "std"))
    packed: np.ndarray = (shared.pack(latents) - mean) / std
    return packed


def reference_size(manifest: Mapping[str, Any], height: int, width: int) -> tuple[Size, Size]:
    """Its own where that is at most LARGEST tokens; cut to whole tokens."""
    side = manifest["latents"]["vae_scale_factor"] * manifest["latents"]["patch"]
    area = LARGEST * side * side
    rows, columns = height, width
    if height * width > area:
        scale = math.sqrt(area / (width * height))
        rows, columns = int(height * scale), int(width * scale)
    if min(rows, columns) < side:
        raise ValueError(
            f"a reference has {width} x {height} pixels, expected a side of at least {side} where"
            f" it has at most {area:,} pixels in all; give another part of it."
        )
    return (rows, columns), (rows // side * side, columns // side * side)


FLUX2 = Family(
    name="flux2",
    title="FLUX.2",
    classes=("Flux2Transformer2DModel", "SparseFlux2Transformer2DModel"),
    components={"text_encoder": 1, "transformer": 0, "vae_decoder": 1},
    tokenizers=("tokenizer",),
    title_of=title_of,
    check=check,
    encode=encode,
    noise=shared.packed_noise,
    layouts=shared.packed_layouts,
    arrange=shared.pack,
    sigmas=sigmas,
    inputs=inputs,
    timesteps=flow_matching.timesteps,
    tokens=lambda latents, settings: latents,
    velocity=lambda sample, settings, latent_size: sample,
    image_latents=image_latents,
    encoded=encoded,
    references=lambda manifest: REFERENCES,
    reference_size=reference_size,
    reference_place=10,
)
