"""Z-Image for export: the transformer's ends with its refiners, its blocks, its text encoder.

Image and text are streams of their own between the calls, as in other families, and one tensor in
a block. The refiners are part of `embed`. Rotary tables and the mask of what fills texts up are of
every row, so that a batch of different prompts is what each is alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m.families.generation_defaults import generation_defaults
from d2m.families.zimage import MASK, STATES
from d2m.families.zimage.weights import EMBEDDING, PATCH, TIME_CHANNELS, filled
from export.families.encoders import TRANSFORMERS, VAE
from export.families.ends import kl_latents, unscaled
from export.families.family import Encoder, Family
from export.graph.attention import attended, heads, rms_norm, rotate, taken_off
from export.graph.program import Environment, Program, Row, Tracing
from export.graph.trace import Spec
from export.text.chat_template import chat_record
from export.text.decoder import decoder_program

STREAMS = ("hidden_states", STATES)
ROPE = ("rope_cos", "rope_sin")
BLOCK_INPUTS = (*STREAMS, "temb", "text_reach", *ROPE)
KIND = f"{PATCH}-1"  # of patches, as the model names its ends
LANGUAGE = {"Qwen3Model": "", "Qwen3ForCausalLM": "model"}  # where the language model is


class Embed(nn.Module):
    """What ZImageTransformer2DModel does before its main blocks; parameter names are the model's.

    The tensors that blocks read as they are go through it, for it reads them too.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        for name in ("all_x_embedder", "t_embedder", "cap_embedder", "x_pad_token"):
            setattr(self, name, getattr(model, name))
        for name in ("cap_pad_token", "noise_refiner", "context_refiner"):
            setattr(self, name, getattr(model, name))
        half = TIME_CHANNELS // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
        self.register_buffer("frequencies", torch.exp(exponent), persistent=False)
        self.scale = model.t_scale

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        timestep: Tensor,
        image_mask: Tensor,
        text_reach: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
    ) -> tuple[Tensor, ...]:
        """[B, T, C], [B, L, width], [B, L], [B], [B, T], [B, L], [B, T + L, C] twice -> image
        [B, T, D], text [B, L, D], temb, and the last four."""
        angle = timestep[:, None].float() * self.scale * self.frequencies
        sinusoid = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)
        temb = self.t_embedder.mlp(sinusoid.to(hidden_states.dtype))
        length = hidden_states.shape[1]
        image = self.all_x_embedder[KIND](hidden_states)
        image = torch.where(image_mask[..., None] > 0.5, image, self.x_pad_token[None])
        turn = (rope_cos[:, :length], rope_sin[:, :length])
        for block in self.noise_refiner:
            image = block(image, None, turn, temb)
        text = self.cap_embedder(encoder_hidden_states)
        own = encoder_hidden_states_mask[..., None] > 0.5
        there = text_reach[..., None].to(text.dtype)
        text = torch.where(own, text, self.cap_pad_token[None]) * there
        turn = (rope_cos[:, length:], rope_sin[:, length:])
        for block in self.context_refiner:
            text = block(text, taken_off(text_reach, text.dtype), turn)
        kept = (each.clone() for each in (image_mask, text_reach, rope_cos, rope_sin))
        return image, text * there, temb, *kept


class Final(nn.Module):
    """What the model does after its blocks, of the image; nought where tokens fill it up."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.all_final_layer = model.all_final_layer

    def forward(self, hidden_states: Tensor, temb: Tensor, image_mask: Tensor) -> Tensor:
        """[B, T, D], temb, [B, T] -> [B, T, channels], all channels of a pixel together."""
        sample: Tensor = self.all_final_layer[KIND](hidden_states, c=temb)
        return sample * image_mask[..., None].to(sample.dtype)


class Attention:
    """Processor for the blocks' Attention with fused projections, in the form of
    export/graph/attention.py: rotary tables are cosines and sines in place of complex numbers."""

    _attention_backend = None  # what diffusers reads on every processor
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, N, D]; attention_mask: what is added to scores; freqs_cis: cos, sin [B, N, C]."""
        assert freqs_cis is not None
        query, key, value = heads(attn.to_qkv(hidden_states), attn.inner_dim // attn.heads)
        if attn.norm_q is not None:
            query, key = rms_norm(query, attn.norm_q), rms_norm(key, attn.norm_k)
        cos, sin = (table[:, None] for table in freqs_cis)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        output: Tensor = attn.to_out[0](attended(query, key, value, attention_mask))
        return output


def call_block(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """A block: -> (image, text)."""
    image, text = (tensors[name] for name in STREAMS)
    reach = torch.cat([torch.ones_like(image[..., 0]), tensors["text_reach"].to(image.dtype)], 1)
    output = run(
        torch.cat([image, text], dim=1),
        taken_off(reach, image.dtype),
        (tensors["rope_cos"], tensors["rope_sin"]),
        tensors["temb"],
    )
    length = image.shape[1]
    return output[:, :length], output[:, length:]


def environment(model: Any, dtype: torch.dtype) -> Environment:
    """The tensors of the program.

    timestep (0 at pure noise), masks and rotary tables are float32 in any bundle.
    """
    config, width = model.config, model.config.dim
    image, text = ("batch", "image_tokens"), ("batch", "text_tokens")
    channels = PATCH**2 * config.in_channels

    def rows() -> dict[str, Spec]:
        table = Spec(torch.float32, ("batch", "tokens", sum(config.axes_dims)))
        masks = {"image_mask": image, "text_reach": text}
        found = {name: Spec(torch.float32, shape) for name, shape in masks.items()}
        return found | dict.fromkeys(ROPE, table)

    inputs = {
        "hidden_states": Spec(dtype, (*image, channels)),
        STATES: Spec(dtype, (*text, config.cap_feat_dim)),
        MASK: Spec(torch.float32, text),
        "timestep": Spec(torch.float32, ("batch",)),
    }
    inner = {
        "hidden_states": Spec(dtype, (*image, width)),
        STATES: Spec(dtype, (*text, width)),
        "temb": Spec(dtype, ("batch", min(width, EMBEDDING))),
    }
    # Twice, for they go through `embed`.
    return inputs | rows(), inner | rows(), {"sample": Spec(dtype, (*image, channels))}


# ---------------------------------------------------------------- the other components


def text_program(model: Any, dtype: torch.dtype) -> Program:
    """The language model but for its last layer."""
    language = LANGUAGE[type(model).__name__]
    return decoder_program(model, language, (model.config.num_hidden_layers - 1,), dtype)


def states(model: Any, output: Any) -> tuple[Tensor, ...]:
    """Of the text encoder, asked for its hidden states."""
    return (output.hidden_states[-2],)


def lengths(directory: Path) -> dict[str, int]:
    """Tokens of the template and of the prompt together."""
    return {"tokenizer": generation_defaults(directory)["max_sequence_length"]}


def tokens_record(tokenizer: Any, length: int, index: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template, as the pipeline asks for it."""
    return chat_record(
        tokenizer,
        length,
        lambda text: [{"role": "user", "content": text}],
        add_generation_prompt=True,
        enable_thinking=True,
    )


def latents(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], directory: Path
) -> dict[str, Any]:
    """The manifest's `latents`; ValueError for another kind of transformer, or another's VAE."""
    sides = (list(transformer.get("all_patch_size", ())), transformer.get("siglip_feat_dim"))
    if sides != ([PATCH], None) or transformer["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"{directory} has a transformer of patches {sides[0]}, siglip_feat_dim {sides[1]} and"
            f" {transformer['in_channels']} channels, expected patches [{PATCH}], no SigLIP and the"
            f" VAE's {vae['latent_channels']}: give a Z-Image pipeline that reads text alone."
        )
    return kl_latents(vae) | {
        "shift_factor": vae.get("shift_factor"),
        "patch": PATCH,
        "rope_axes": list(transformer["axes_dims"]),
        "rope_theta": transformer["rope_theta"],
    }


def text_tokens(lengths: Mapping[str, int]) -> dict[str, int]:
    """The transformer reads all that the text encoder does, filled up."""
    return {"": filled(lengths["tokenizer"]), "text_encoder": lengths["tokenizer"]}


# ---------------------------------------------------------------- torch's side of parity


def reaches(keywords: Mapping[str, Any]) -> list[int]:
    """Tokens of every text with those that the model fills it up with."""
    return [filled(len(text)) for text in keywords["cap_feats"]]


def apart(
    keywords: dict[str, Any], output: Any, text_tokens: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A block's keywords and what it returns with both streams apart, the image's tokens first."""
    split = [keywords["x"].shape[1] - text_tokens, text_tokens]
    given = keywords | dict(zip(STREAMS, keywords["x"].split(split, dim=1)))
    return given, dict(zip(STREAMS, output.split(split, dim=1)))


def block_inputs(keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """A block's keywords as the program's tensors: complex tables as real ones."""
    found = {name: keywords[name] for name in STREAMS} | {"temb": keywords["adaln_input"]}
    text = found[STATES].shape[1]
    mask = keywords["attn_mask"]
    found["text_reach"] = torch.ones(found[STATES].shape[:2])
    if mask is not None:
        found["text_reach"] = mask[:, -text:].float()
    turned = keywords["freqs_cis"].repeat_interleave(2, dim=-1)
    return found | dict(zip(ROPE, (turned.real, turned.imag)))


def cut(latents: Any) -> Tensor:
    """Tensors [C, 1, h, w] -> tokens [n, T, 4 C] and zeros that fill them up."""
    rows = torch.stack(list(latents)).squeeze(2)
    patches = F.unfold(rows, PATCH, stride=PATCH).transpose(1, 2)
    tokens = patches.unflatten(-1, (rows.shape[1], -1)).transpose(-1, -2).flatten(-2)
    return F.pad(tokens, (0, 0, 0, filled(tokens.shape[1]) - tokens.shape[1]))


def image_mask(keywords: Mapping[str, Any]) -> Tensor:
    """1 for an image's own tokens [n, T]."""
    first = keywords["x"][0]
    real = first.shape[-2] * first.shape[-1] // PATCH**2
    own = (torch.arange(filled(real)) < real).float()
    return own.expand(len(keywords["x"]), -1)


def model_inputs(
    model: Any, keywords: Mapping[str, Any], first: Mapping[str, Any]
) -> dict[str, Any]:
    """The forward's keywords: latents cut into patches, texts filled up to the longest."""
    texts, most = keywords["cap_feats"], max(reaches(keywords))
    found = {
        "hidden_states": cut(keywords["x"]),
        STATES: torch.stack([F.pad(text, (0, 0, 0, most - len(text))) for text in texts]),
        MASK: torch.stack([(torch.arange(most) < len(text)).float() for text in texts]),
        "timestep": keywords["t"],
        "image_mask": image_mask(keywords),
    }
    return found | {name: first[name] for name in ("text_reach", *ROPE)}


ZIMAGE = Family(
    name="zimage",
    components=(
        # 8 GB: its weights are read one by one.
        Encoder(
            "text_encoder",
            "text_encoder",
            TRANSFORMERS,
            "Qwen3Model",
            text_program,
            states,
            whole=False,
            others=("Qwen3ForCausalLM",),
            read=("input_ids", "attention_mask"),
        ),
        None,
        *VAE,
    ),
    tracing=Tracing(
        environment=environment,
        embed=Embed,
        final=Final,
        row=lambda block: Row("layer", BLOCK_INPUTS, STREAMS, call_block),
        processor=Attention,
        final_inputs=("hidden_states", "temb", "image_mask"),
    ),
    lengths=lengths,
    latents=latents,
    text_tokens=text_tokens,
    block_inputs=block_inputs,
    model_inputs=model_inputs,
    sample=lambda model, output: cut(output),
    unread=lambda model, keywords: {"image_mask": image_mask(keywords)},
    spatial=unscaled,
    tokens_record=tokens_record,
    apart=apart,
    through=("image_mask", "text_reach", *ROPE),
    text_tokens_of=lambda keywords: max(reaches(keywords)),
)
