"""Text encoders and VAE as programs of one call: what FluxPipeline asks of each.

text_encoder    input_ids [batch, text_tokens] -> pooled [batch, width]: CLIP's pooler_output
text_encoder_2  input_ids [batch, text_tokens] -> states [batch, text_tokens, width]: T5
                (SD3: two CLIPs with pooled and states, then T5)
vae_decoder     latents [batch, C, h, w] -> image [batch, 3, H, W] in about -1 to 1; the latents
                are unscaled already (latents / scaling_factor + shift_factor)
vae_encoder     image [batch, 3, H, W] in -1 to 1 -> latents [batch, C, h, w], not scaled yet: the
                mean of the distribution that the VAE gives
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from export.families.family import Encoder
from export.graph.blocks import block_type
from export.graph.program import Program
from export.graph.trace import Spec

IDS = Spec(torch.int64, ("batch", "text_tokens"))


def clip_program(model: Any, dtype: torch.dtype) -> Program:
    """transformers' CLIPTextModel. The causal mask is made in the graph, for any batch."""
    use_eager_attention(model)

    def call(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Tensor:
        ids = tensors["input_ids"]
        output = run(input_ids=ids, attention_mask=causal_mask(ids.shape[1], dtype))
        pooled: Tensor = output.pooler_output
        return pooled

    pooled = Spec(dtype, ("batch", model.config.hidden_size))
    return one_call("clip", model, call, {"input_ids": IDS}, {"pooled": pooled}, dtype)


def clip_projection_program(model: Any, dtype: torch.dtype) -> Program:
    """transformers' CLIPTextModelWithProjection: the pooled projection, and the states that the
    last layer but one writes."""
    use_eager_attention(model)

    def call(run: Callable[..., Any], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids = tensors["input_ids"]
        mask = causal_mask(ids.shape[1], dtype)
        output = run(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return output.text_embeds, output.hidden_states[-2]

    config = model.config
    outputs = {
        "pooled": Spec(dtype, ("batch", config.projection_dim)),
        "states": Spec(dtype, ("batch", "text_tokens", config.hidden_size)),
    }
    return one_call("clip", model, call, {"input_ids": IDS}, outputs, dtype)


def t5_program(model: Any, dtype: torch.dtype) -> Program:
    """transformers' T5EncoderModel. FLUX masks no padding, and so does this."""
    use_eager_attention(model)

    def call(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Tensor:
        states: Tensor = run(input_ids=tensors["input_ids"])[0]
        return states

    states = Spec(dtype, ("batch", "text_tokens", model.config.d_model))
    return one_call("t5", model, call, {"input_ids": IDS}, {"states": states}, dtype)


def masked_t5_program(model: Any, dtype: torch.dtype) -> Program:
    """transformers' T5EncoderModel with its padding masked: the mask [B, L], and states.

    Padding is what follows the end-of-text token, the last that is not the pad token: a pad token
    that was written in the prompt is read, as diffusers reads it.
    """
    use_eager_attention(model)
    pad = model.config.pad_token_id

    def call(run: Callable[..., Any], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids = tensors["input_ids"]
        written = (ids != pad).to(torch.int32)
        position = torch.cumsum(torch.ones_like(written), dim=1, dtype=torch.int32)
        text = position <= (position * written).amax(1, keepdim=True)
        least = torch.tensor(torch.finfo(dtype).min, dtype=dtype)
        bias = torch.where(text, torch.zeros((), dtype=dtype), least)
        return text.to(dtype), run(input_ids=ids, attention_mask=bias[:, None, None])[0]

    text = ("batch", "text_tokens")
    outputs = {"mask": Spec(dtype, text), "states": Spec(dtype, (*text, model.config.d_model))}
    return one_call("t5", model, call, {"input_ids": IDS}, outputs, dtype)


def vae_program(model: Any, dtype: torch.dtype) -> Program:
    """The decoding half of diffusers' AutoencoderKL, for any size."""
    config = model.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    channels = config.latent_channels, config.out_channels
    return decoder_program(Decoder(model), dtype, channels, factor)


def decoder_program(
    decoder: nn.Module, dtype: torch.dtype, channels: tuple[int, int], factor: int
) -> Program:
    """Latents [B, C, h, w] -> image [B, 3, f h, f w]; channels: of both, f = `factor`."""

    def call(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Tensor:
        image: Tensor = run(tensors["latents"])
        return image

    sides = ("latent_height", "latent_width")
    latents = Spec(dtype, ("batch", channels[0], *sides))
    image = Spec(dtype, ("batch", channels[1], *(f"{factor}*{side}" for side in sides)))
    return one_call("vae", decoder, call, {"latents": latents}, {"image": image}, dtype)


def vae_encoder_program(model: Any, dtype: torch.dtype) -> Program:
    """The encoding half of diffusers' AutoencoderKL, for any size that it divides."""
    config = model.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    return encoder_program(ImageEncoder(model), dtype, config.latent_channels, factor)


def encoder_program(module: nn.Module, dtype: torch.dtype, channels: int, factor: int) -> Program:
    """Image [B, 3, f h, f w] -> latents [B, C, h, w]; f = `factor`, C = `channels`."""

    def call(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Tensor:
        latents: Tensor = run(tensors["image"])
        return latents

    sides = ("latent_height", "latent_width")
    image = Spec(dtype, ("batch", 3, *(f"{factor}*{side}" for side in sides)))
    latents = Spec(dtype, ("batch", channels, *sides))
    return one_call("vae", module, call, {"image": image}, {"latents": latents}, dtype)


class ImageEncoder(nn.Module):
    """AutoencoderKL.encode without slicing and tiling; parameter names are the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.quant_conv = model.quant_conv

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w], the mean."""
        moments = self.encoder(image)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean: Tensor = moments.chunk(2, dim=1)[0]
        return mean


class Decoder(nn.Module):
    """AutoencoderKL.decode without slicing and tiling; parameter names are the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.post_quant_conv = model.post_quant_conv
        self.decoder = model.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W]."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        image: Tensor = self.decoder(latents)
        return image


def one_call(
    name: str,
    module: nn.Module,
    call: Any,
    inputs: Mapping[str, Spec],
    outputs: Mapping[str, Spec],
    dtype: torch.dtype,
) -> Program:
    """A program of one call of one type."""
    kind = block_type(name, module, call, inputs, outputs, dtype)
    return Program({name: kind}, [(name, "")], dict(inputs), dict(outputs))


def use_eager_attention(model: Any) -> None:
    """Attention as matmul, softmax, matmul: the exporter keeps these three as they are."""
    model.set_attn_implementation("eager")


def causal_mask(tokens: int, dtype: torch.dtype) -> Tensor:
    """[1, 1, T, T]: zero on and below the diagonal, the type's minimum above.

    Given to the model in place of the mask that it would make for the batch of the trace.
    """
    position = torch.arange(tokens)
    above = position[None, :] > position[:, None]
    zero, least = torch.zeros((), dtype=dtype), torch.tensor(torch.finfo(dtype).min, dtype=dtype)
    return torch.where(above, least, zero)[None, None]


def pooled(model: Any, output: Any) -> tuple[Tensor, ...]:
    """Of CLIPTextModel."""
    return (output.pooler_output,)


def pooled_and_states(model: Any, output: Any) -> tuple[Tensor, ...]:
    """Of CLIPTextModelWithProjection."""
    return output.text_embeds, output.hidden_states[-2]


def first(model: Any, output: Any) -> tuple[Tensor, ...]:
    """Of T5EncoderModel, or of a decoder without a dictionary."""
    return (output[0],)


def latent_mean(model: Any, output: Any) -> tuple[Tensor, ...]:
    """Of a VAE's encode."""
    return (output.latent_dist.mean,)


# The last fields of an Encoder for what most families share (export.families.family).
TRANSFORMERS = "transformers"
T5 = (TRANSFORMERS, "T5EncoderModel", t5_program, first)
VAE = (
    Encoder("vae_decoder", "vae", "diffusers", "AutoencoderKL", vae_program, first),
    Encoder("vae_encoder", "vae", "diffusers", "AutoencoderKL", vae_encoder_program, latent_mean),
)
MASKED_T5 = Encoder(
    "text_encoder",
    "text_encoder",
    TRANSFORMERS,
    "T5EncoderModel",
    masked_t5_program,
    first,
    whole=False,  # read tensor by tensor
    passed_inputs=("attention_mask",),
)
