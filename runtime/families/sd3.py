"""Stable Diffusion 3 and 3.5 in the runtime: what StableDiffusion3Pipeline does around its models.

Read: diffusers 0.42. Letters: n images, C latent channels, h x w latent pixels, p the side of a
patch, T = (h / p)(w / p) tokens, L text tokens: the CLIPs' before T5's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.families.family import Arrays, Family, Run
from runtime.families.flow_matching import TRAIN_STEPS
from runtime.families.flow_matching import sigmas as flow_sigmas
from runtime.families.latents import Settings, Size, unscale
from runtime.files.checked_json import integer, mapping, wrong


def title_of(config: Mapping[str, Any]) -> str:
    """SD3, SD3.5 large (norms of queries and keys) or SD3.5 medium (two attentions a block)."""
    if not config.get("qk_norm"):
        return "Stable Diffusion 3"
    size = "medium" if config.get("dual_attention_layers") else "large"
    return f"Stable Diffusion 3.5 {size}"


def check(manifest: Mapping[str, Any]) -> None:
    """ValueError (a clause) unless the default image fits the table of positions.

    And unless both CLIPs write what `encode` reads.
    """
    for name in ("text_encoder", "text_encoder_2"):
        outputs = manifest["components"][name]["outputs"]
        if set(outputs) != {"pooled", "states"}:
            raise wrong(f"components.{name}.outputs", sorted(outputs), "pooled and states")
    latents = mapping(dict(manifest), "latents")
    integer(latents, "grid", 1, 1 << 14, "latents")
    for side in ("height", "width"):
        pixels = mapping(dict(manifest), "defaults").get(side)
        if isinstance(pixels, int) and pixels > largest(manifest):
            raise wrong(f"defaults.{side}", pixels, f"at most {largest(manifest)}")


def largest(manifest: Mapping[str, Any]) -> int:
    """Pixels of a side that the table of positions covers."""
    latents = manifest["latents"]
    side: int = latents["grid"] * latents["patch"] * latents["vae_scale_factor"]
    return side


def encode(run: Run, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """States [n, L, joint width] and pooled vectors [n, P].

    The CLIPs' states stand side by side, filled up with zeros to T5's width, and before T5's.
    """
    first = run("text_encoder", "tokenizer", prompts)
    second = run("text_encoder_2", "tokenizer_2", prompts)
    (t5,) = run("text_encoder_3", "tokenizer_3", prompts).values()
    clip = np.concatenate([first["states"], second["states"]], axis=-1)
    clip = np.pad(clip, ((0, 0), (0, 0), (0, t5.shape[-1] - clip.shape[-1])))
    return {
        "encoder_hidden_states": np.concatenate([clip, t5], axis=1),
        "pooled_projections": np.concatenate([first["pooled"], second["pooled"]], axis=-1),
    }


def sigmas(
    config: dict[str, Any], steps: int, image_tokens: int, given: Sequence[float] | None = None
) -> np.ndarray:
    """Noise levels [steps + 1]: where none are given, the scheduler's own even timesteps.

    (FluxPipeline gives its scheduler sigmas, StableDiffusion3Pipeline none.)
    """
    own = config if given is not None else {**config, "use_flow_sigmas": True}
    return flow_sigmas(own, steps, image_tokens, given)


def positions(grid: int, height: int, width: int) -> np.ndarray:
    """Rows of the table of positions [T], int64: the middle of its grid x grid (read: PatchEmbed).

    height, width: in tokens.
    """
    top, left = (grid - height) // 2, (grid - width) // 2
    row = np.arange(top, top + height, dtype=np.int64)[:, None]
    return (row * grid + np.arange(left, left + width, dtype=np.int64)[None, :]).reshape(-1)


def inputs(
    manifest: Mapping[str, Any], conditions: Arrays, latent_size: Size, guidance: float
) -> dict[str, np.ndarray]:
    """See runtime.families.family; guidance is none of the inputs."""
    settings = manifest["latents"]
    height, width = (side // settings["patch"] for side in latent_size)
    return {**conditions, "positions": positions(settings["grid"], height, width)}


def timesteps(config: Mapping[str, Any], levels: np.ndarray) -> np.ndarray:
    """Noise levels [S] -> timesteps [S] from 1000 to 0, float32."""
    return levels.astype(np.float32) * np.float32(config.get("num_train_timesteps", TRAIN_STEPS))


def image_latents(latents: np.ndarray, settings: Settings, latent_size: Size) -> np.ndarray:
    """[n, C, h, w], unscaled."""
    return unscale(latents, settings["scaling_factor"], settings.get("shift_factor"))


def residuals(blocks: int, count: int) -> list[int | None]:
    """Spread evenly, none for the last block (read: SD3Transformer2DModel.forward)."""
    return [*(int(index / (blocks / count)) for index in range(blocks - 1)), None]


SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3",
    classes=("SD3Transformer2DModel", "SparseSD3Transformer2DModel"),
    components={
        "text_encoder": 2,
        "text_encoder_2": 2,
        "text_encoder_3": 1,
        "transformer": 0,
        "vae_decoder": 1,
    },
    tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
    guided=True,
    title_of=title_of,
    check=check,
    largest=largest,
    encode=encode,
    sigmas=sigmas,
    inputs=inputs,
    timesteps=timesteps,
    image_latents=image_latents,
    residuals=residuals,
)
