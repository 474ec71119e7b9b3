"""Pictures and captions as a FLUX transformer takes them, made by the pipeline's own encoders.

One sample at a time, so that its encoding depends on nothing else: batches of other sizes would
round differently, and a run with a cache could not repeat one without. Letters: T image tokens,
C packed channels, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.batches import encode_images
from calib.cache import digest_of, kept, key_of
from calib.pictures import pixels

if TYPE_CHECKING:
    from diffusers import FluxPipeline
    from torch import Tensor

Encoding = dict[str, "Tensor"]
HOW = "covered, centred, mode 1"  # in the keys: another way to cut or encode is another key


def check_size(pipe: FluxPipeline, height: int, width: int) -> None:
    """ValueError unless the VAE encodes pictures of this size into whole 2 x 2 patches."""
    patch = 2 * pipe.vae_scale_factor
    if height % patch or width % patch or min(height, width) < patch:
        raise ValueError(
            f"pictures of {height} x {width} pixels do not divide into the pipeline's patches of "
            f"{patch} pixels; expected multiples of that as --size."
        )


def picture_encoder(
    pipe: FluxPipeline,
    height: int,
    width: int,
    cache: Path | None = None,
    log: Callable[[str], None] = print,
) -> Callable[[bytes], Encoding]:
    """A function: file of a picture -> `latents` [T, C], shifted, scaled and packed, on the CPU.

    calib.source.Damaged if the bytes are no picture.
    """
    import torch

    check_size(pipe, height, width)
    encoder = digest_of(pipe.vae) if cache else ""

    @torch.no_grad()
    def encode(data: bytes) -> Encoding:
        def compute() -> Encoding:
            image = torch.from_numpy(pixels(data, height, width))
            return {"latents": encode_images(pipe, image[None])[0]}

        def key() -> str:
            return key_of("latents", HOW, encoder, data, height, width)

        return kept(cache, "latents", key, compute, log)

    return encode


def text_encoder(
    pipe: FluxPipeline,
    length: int,
    cache: Path | None = None,
    log: Callable[[str], None] = print,
) -> Callable[[str], Encoding]:
    """A function: caption -> `encoder_hidden_states` [L, width], `pooled_projections` [width].

    length: L, to which T5's tokens are cut and filled up. On the CPU.
    """
    import torch

    both: list[Any] = [pipe.text_encoder, pipe.text_encoder_2]
    encoders = [digest_of(each) for each in both] if cache else []

    @torch.no_grad()
    def encode(caption: str) -> Encoding:
        def compute() -> Encoding:
            states, pooled, _ = pipe.encode_prompt(
                [caption], prompt_2=None, max_sequence_length=length
            )
            return {"encoder_hidden_states": states[0], "pooled_projections": pooled[0]}

        def key() -> str:
            # The tokens stand for the tokenizers: another vocabulary is another key.
            ids = [str(each(caption).input_ids) for each in (pipe.tokenizer, pipe.tokenizer_2)]
            return key_of("text", *encoders, *ids, caption, length)

        return kept(cache, "text", key, compute, log)

    return encode


def collate(
    pipe: FluxPipeline, samples: Sequence[Encoding], height: int, width: int
) -> dict[str, Tensor]:
    """Encodings -> a batch on the transformer's device, with `img_ids` [T, 3], `txt_ids` [L, 3]."""
    import torch

    device = pipe.transformer.device
    batch = {
        name: torch.stack([sample[name] for sample in samples]).to(device) for name in samples[0]
    }
    latents, states = batch["latents"], batch["encoder_hidden_states"]
    rows, columns = (size // (2 * pipe.vae_scale_factor) for size in (height, width))
    ids = pipe._prepare_latent_image_ids(len(samples), rows, columns, device, latents.dtype)
    return batch | {
        "img_ids": ids,
        "txt_ids": torch.zeros(states.shape[1], 3, device=device, dtype=states.dtype),
    }
