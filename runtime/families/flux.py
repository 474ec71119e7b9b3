"""FLUX.1 [dev], [schnell] and Kontext in the runtime: what FluxPipeline does around its models.

[schnell] has no guidance embedding, so its transformer has no input `guidance`; its scheduler's
shift is 1 and not dynamic, which the manifest says as it does for [dev]. Kontext is [dev] that sees
an image beside the noise; the manifest's `latents.condition` says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.families import latents as shared
from runtime.families.family import Arrays, Family, Run, rows
from runtime.families.flow_matching import sigmas, timesteps
from runtime.families.latents import Size
from runtime.files.checked_json import mapping, one_of, wrong

REFERENCE = "reference"  # the manifest's latents.condition of Kontext
# read: diffusers' PREFERRED_KONTEXT_RESOLUTIONS, sizes of about AREA pixels that Kontext learned
SHORT = (672, 688, 720, 752, 800, 832, 880, 944, 1024)
LONG = (1568, 1504, 1456, 1392, 1328, 1248, 1184, 1104, 1024)
AREA = 1024 * 1024


def title_of(config: Mapping[str, Any]) -> str:
    """FLUX.1 [dev] or FLUX.1 [schnell], by the guidance embedding; or a model that reads more than
    latents, by its channels."""
    read, written = config.get("in_channels", 64), config.get("out_channels")
    if written and read != written:
        return f"FLUX.1 {'Canny or Depth' if read == 2 * written else 'Fill'} [dev]"
    return f"FLUX.1 [{'dev' if config.get('guidance_embeds') else 'schnell'}]"


def check(manifest: Mapping[str, Any]) -> None:
    """ValueError (a clause) unless latents are packed, with the channels of what a token reads."""
    shared.check_packed(manifest)
    settings = mapping(dict(manifest), "latents")
    more = {
        None: 0,
        REFERENCE: 0,
        "control": 4 * settings["channels"],
        "fill": 4 * settings["channels"] + 4 * settings["vae_scale_factor"] ** 2,
    }
    if "condition" in settings:
        one_of(settings, "condition", ("control", "fill", REFERENCE), "latents")
    wanted = 4 * settings["channels"] + more[settings.get("condition")]
    read = manifest["components"]["transformer"]["inputs"].get("hidden_states", {}).get("shape")
    if not read or read[-1] != wanted:
        where = "components.transformer.inputs.hidden_states.shape"
        raise wrong(where, read, f"{wanted} channels, as latents has it")


def guided(manifest: Mapping[str, Any]) -> bool:
    """Whether the transformer embeds guidance."""
    return "guidance" in manifest["components"]["transformer"]["inputs"]


def encode(run: Run, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """T5's states [n, L, joint width] and CLIP's pooled vectors [n, P]."""
    (pooled,) = run("text_encoder", "tokenizer", prompts).values()
    (states,) = run("text_encoder_2", "tokenizer_2", prompts).values()
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def inputs(
    manifest: Mapping[str, Any], conditions: Arrays, latent_size: Size, guidance: float
) -> dict[str, np.ndarray]:
    """See runtime.families.family; guidance is an input where the model embeds it."""
    length = conditions["encoder_hidden_states"].shape[1]
    found = {**conditions, **shared.joint_rope(manifest["latents"], length, latent_size)}
    if guided(manifest):
        found["guidance"] = np.full(rows(conditions), guidance, np.float32)
    return found


def references(manifest: Mapping[str, Any]) -> int:
    """Kontext sees one image."""
    return int(manifest["latents"].get("condition") == REFERENCE)


def reference_size(manifest: Mapping[str, Any], height: int, width: int) -> tuple[Size, Size]:
    """The size of Kontext's list whose shape is nearest; of a model that generates another area
    than AREA by default, as much larger or smaller (ours)."""
    settings, defaults = manifest["latents"], manifest["defaults"]
    pairs = (*zip(SHORT, LONG), *zip(LONG, SHORT))
    _, columns, rows = min((abs(width / height - w / h), w, h) for w, h in pairs)
    scale = math.sqrt(defaults["height"] * defaults["width"] / AREA)
    side = settings["vae_scale_factor"] * settings["patch"]
    rows, columns = (max(1, int(each * scale + 1e-6) // side) * side for each in (rows, columns))
    return (rows, columns), (rows, columns)


def residuals(blocks: int, count: int) -> list[int | None]:
    """Each residual for so many neighbours, rounded up (read: FluxTransformer2DModel.forward)."""
    return [index // math.ceil(blocks / count) for index in range(blocks)]


FLUX = Family(
    name="flux",
    components={"text_encoder": 1, "text_encoder_2": 1, "transformer": 0, "vae_decoder": 1},
    tokenizers=("tokenizer", "tokenizer_2"),
    title="FLUX.1",
    classes=("FluxTransformer2DModel", "SparseFluxTransformer2DModel"),
    title_of=title_of,
    check=check,
    encode=encode,
    noise=shared.packed_noise,
    layouts=shared.packed_layouts,
    arrange=shared.pack,
    sigmas=sigmas,
    inputs=inputs,
    timesteps=timesteps,
    tokens=lambda latents, settings: latents,
    velocity=lambda sample, settings, latent_size: sample,
    image_latents=shared.unpacked,
    residuals=residuals,
    encoded=shared.scaled_and_packed,
    references=references,
    reference_size=reference_size,
    reference_place=1,
)
