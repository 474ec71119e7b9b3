"""Z-Image in the runtime: what ZImagePipeline and its transformer do around the blocks.

Read: diffusers 0.42. Image and text are each filled up to whole multiples of 32 tokens with learnt
ones, which count like any others; a text's own end, and with it where the image stands, is another
in every row. Guidance is written as of other families, 1 more than diffusers' own number. Letters:
n images, C latent channels, h x w latent pixels, T = (h / 2)(w / 2) tokens, L text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.families import flow_matching
from runtime.families import latents as shared
from runtime.families.family import Arrays, Family, Run
from runtime.families.latents import Settings, Size

STATES, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
MULTIPLE = 32  # read: of tokens, of image and text each


def check(manifest: Mapping[str, Any]) -> None:
    """ValueError (a clause) unless tokens are 2 x 2 patches and there are three rotary axes."""
    shared.check_packed(manifest)


def filled(tokens: Any) -> Any:
    """Tokens with those that fill them up."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def lengthened(array: np.ndarray) -> np.ndarray:
    """[n, L, ...] with zeros behind, up to a whole multiple of tokens."""
    more = filled(array.shape[1]) - array.shape[1]
    return np.pad(array, [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2))


def encode(run: Run, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """States [n, L, width], zeros behind a text's end, and the mask [n, L], 1 where it is."""
    found = run("text_encoder", "tokenizer", prompts)
    mask = found["mask"].astype(np.float32)
    return {STATES: found["states"] * mask[..., None], MASK: mask}


def positions(reach: int, length: int, size: Size) -> np.ndarray:
    """Positions [T + L, 3] of one row, the image's first: (reach + 1, row, column), (1 + place, 0,
    0); what fills an image up is at 0. reach: the text's tokens with those that fill it up."""
    height, width = (side // 2 for side in size)
    image = np.zeros((filled(height * width), 3), np.float32)
    grid = np.indices((height, width)).reshape(2, -1).T
    image[: len(grid), 0], image[: len(grid), 1:] = reach + 1, grid
    text = np.zeros((length, 3), np.float32)
    text[:, 0] = 1 + np.arange(length)
    return np.concatenate([image, text])


def inputs(
    manifest: Mapping[str, Any], conditions: Arrays, latent_size: Size, guidance: float
) -> dict[str, np.ndarray]:
    """See runtime.families.family; guidance is none of the inputs. Rotary tables are [n, T + L, C],
    and zero where no text reaches."""
    settings, mask = manifest["latents"], lengthened(conditions[MASK].astype(np.float32))
    count, length = mask.shape
    real = latent_size[0] * latent_size[1] // 4
    image = np.zeros((count, filled(real)), np.float32)
    image[:, :real] = 1
    reaches = filled(mask.sum(1).astype(np.int64))
    reach = (np.arange(length)[None, :] < reaches[:, None]).astype(np.float32)
    own = np.concatenate([np.ones_like(image), reach], axis=1)[..., None]
    tables = [
        shared.rope(
            positions(int(each), length, latent_size), settings["rope_axes"], settings["rope_theta"]
        )
        for each in reaches
    ]
    cos, sin = (np.stack(each) * own for each in zip(*tables))
    found = {STATES: lengthened(conditions[STATES]), MASK: mask, "image_mask": image}
    return found | {"text_reach": reach, "rope_cos": cos, "rope_sin": sin}


def timesteps(config: Mapping[str, Any], levels: np.ndarray) -> np.ndarray:
    """Noise levels [S] -> the model's times [S], 0 at pure noise."""
    return np.float32(1) - flow_matching.timesteps(config, levels)


def tokens(latents: np.ndarray, settings: Settings) -> np.ndarray:
    """[n, C, h, w] -> [n, T, 4 C], all channels of a pixel together; zeros fill it up."""
    n, channels, height, width = latents.shape
    cut = latents.reshape(n, channels, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 3, 5, 1)
    return lengthened(cut.reshape(n, -1, 4 * channels))


def velocity(sample: np.ndarray, settings: Settings, latent_size: Size) -> np.ndarray:
    """The transformer's output, towards the image, as the velocity [n, C, h, w] away from it."""
    real = latent_size[0] * latent_size[1] // 4
    return -shared.unpatchify(sample[:, :real], settings, latent_size)


def image_latents(latents: np.ndarray, settings: Settings, latent_size: Size) -> np.ndarray:
    """[n, C, h, w], unscaled."""
    return shared.unscale(latents, settings["scaling_factor"], settings.get("shift_factor"))


ZIMAGE = Family(
    name="zimage",
    title="Z-Image",
    classes=("ZImageTransformer2DModel", "SparseZImageTransformer2DModel"),
    components={"text_encoder": 1, "transformer": 0, "vae_decoder": 1},
    tokenizers=("tokenizer",),
    guided=True,
    masked=True,
    title_of=lambda config: "Z-Image",
    check=check,
    encode=encode,
    sigmas=flow_matching.sigmas,
    inputs=inputs,
    timesteps=timesteps,
    tokens=tokens,
    velocity=velocity,
    image_latents=image_latents,
)
