"""Pictures and captions as a transformer takes them, made by the pipeline's own encoders.

One sample at a time, so that its encoding depends on nothing else: batches of other sizes would
round differently, and a run with a cache could not repeat one without. Letters: T image tokens,
C packed channels, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.data.encoding_cache import cached, digest_of, key_of
from calib.data.pixels import pixels
from d2m.families import family_of_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

Encoding = dict[str, "Tensor"]
HOW = "covered, centred, mode 1"  # in the keys: another way to cut or encode is another key


def check_size(pipe: DiffusionPipeline, height: int, width: int) -> None:
    """ValueError unless the VAE encodes pictures of this size into whole 2 x 2 patches."""
    patch = 2 * pipe.vae_scale_factor
    if height % patch or width % patch or min(height, width) < patch:
        raise ValueError(
            f"pictures of {height} x {width} pixels do not divide into the pipeline's patches of "
            f"{patch} pixels; expected multiples of that as --size."
        )


def image_encoder(
    pipe: DiffusionPipeline,
    height: int,
    width: int,
    cache: Path | None = None,
    log: Callable[[str], None] = print,
) -> Callable[[bytes], Encoding]:
    """A function: file of a picture -> `latents` of one sample, shifted and scaled, on the CPU.

    calib.data.source.Damaged if the bytes are no picture.
    """
    import torch

    check_size(pipe, height, width)
    encoder = digest_of(pipe.vae) if cache else ""
    encode_images = family_of_pipeline(pipe).data.encode_images

    @torch.no_grad()
    def encode(data: bytes) -> Encoding:
        def compute() -> Encoding:
            image = torch.from_numpy(pixels(data, height, width))
            return {"latents": encode_images(pipe, image[None])[0]}

        key = partial(key_of, "latents", HOW, encoder, data, height, width)
        return cached(cache, "latents", key, compute, log)

    return encode


def text_encoder(
    pipe: DiffusionPipeline,
    length: int,
    cache: Path | None = None,
    log: Callable[[str], None] = print,
) -> Callable[[str], Encoding]:
    """A function: caption -> the family's conditions of one sample, on the CPU.

    length: to which T5's tokens are cut and filled up.
    """
    import torch

    encode_text = family_of_pipeline(pipe).data.encode_text
    encoders = [digest_of(each) for each in parts_of(pipe, "text_encoder")] if cache else []

    @torch.no_grad()
    def encode(caption: str) -> Encoding:
        def compute() -> Encoding:
            found = encode_text(pipe, [caption], length)
            return {name: tensor[0] for name, tensor in found.items()}

        def key() -> str:
            # The tokens stand for the tokenizers: another vocabulary is another key.
            parts = parts_of(pipe, "tokenizer")  # or a processor, whose first argument is none
            ids = [str(each(text=caption).input_ids) for each in parts]
            return key_of("text", *encoders, *ids, caption, length)

        return cached(cache, "text", key, compute, log)

    return encode


def collate(
    pipe: DiffusionPipeline, samples: Sequence[Encoding], height: int, width: int
) -> dict[str, Tensor]:
    """Encodings -> a batch on the transformer's device, with what `Data.position_ids` adds."""
    import torch

    device = pipe.transformer.device
    batch = {
        name: torch.stack([sample[name] for sample in samples]).to(device) for name in samples[0]
    }
    return batch | family_of_pipeline(pipe).data.position_ids(pipe, batch, height, width)


def parts_of(pipe: DiffusionPipeline, name: str) -> list[Any]:
    """The pipeline's components called `name`, `name_2`, ..., those that are there."""
    found = sorted(each for each in pipe.components if each == name or each.startswith(f"{name}_"))
    return [pipe.components[each] for each in found if pipe.components[each] is not None]
