"""Qwen-Image for export: the transformer's ends and blocks, its text encoder, its VAE.

Texts are filled up to one length, and the mask is an input of every block: what is masked weighs
exactly nothing. Of Qwen2.5-VL the language model alone is compiled; its causal mask makes the end
of a filled text invisible to what stands before it, so it needs no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m.families.generation_defaults import generation_defaults
from d2m.families.qwen import MASK, STATES, TEMPLATE_TOKENS
from export.families import modulation
from export.families.encoders import (
    IDS,
    TRANSFORMERS,
    causal_mask,
    first,
    latent_mean,
    use_eager_attention,
)
from export.families.ends import Final, check_packed
from export.families.family import Encoder, Family
from export.families.qwen_vae import vae_encoder_program, vae_program
from export.graph.attention import MASKED, attended, heads, rms_norm, rotate
from export.graph.blocks import block_type
from export.graph.program import Environment, Program, Row, Tracing
from export.graph.trace import Spec

STREAMS = ("hidden_states", STATES)
BLOCK_INPUTS = (*STREAMS, MASK, "temb", "rope_cos", "rope_sin")
VARIANTS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "guidance_embeds")


class Embed(nn.Module):
    """What QwenImageTransformer2DModel does before its blocks; parameter names are the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.img_in = model.img_in
        self.txt_norm = model.txt_norm
        self.txt_in = model.txt_in
        self.time_text_embed = model.time_text_embed
        modulation.attach(model, self)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> tuple[Tensor, ...]:
        """-> image tokens [B, T, D], text tokens [B, L, D], temb [B, D], maybe modulation."""
        image = self.img_in(hidden_states)
        text = self.txt_in(rms_norm(encoder_hidden_states, self.txt_norm))
        temb = self.time_text_embed(timestep.to(image.dtype), image)
        return image, text, temb, *modulation.output(self, temb)


class MaskedAttention:
    """Processor for Qwen-Image's Attention with fused projections: text before the image.

    The same arithmetic as diffusers' QwenDoubleStreamAttnProcessor2_0, in the form of
    export/graph/attention.py; rotary tables are cosines and sines in place of complex numbers.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[B, T, D], [B, L, D], mask [B, L] of ones and zeros -> outputs of the first two's shapes.

        image_rotary_emb: cos, sin [L + T, C].
        """
        assert image_rotary_emb is not None
        size = attn.inner_dim // attn.heads
        image = heads(attn.to_qkv(hidden_states), size)
        text = heads(attn.to_added_qkv(encoder_hidden_states), size)
        query = torch.cat(
            [rms_norm(text[0], attn.norm_added_q), rms_norm(image[0], attn.norm_q)], dim=2
        )
        key = torch.cat(
            [rms_norm(text[1], attn.norm_added_k), rms_norm(image[1], attn.norm_k)], dim=2
        )
        value = torch.cat([text[2], image[2]], dim=2)
        query, key = rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb)
        words = (encoder_hidden_states_mask.to(query.dtype) - 1) * MASKED
        bias = torch.cat([words, torch.zeros_like(hidden_states[..., 0])], dim=1)[:, None, None]
        output = attended(query, key, value, bias)
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](output[:, length:]), attn.to_add_out(output[:, :length])


def call_block(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """A block: -> (text, image). temb is what its modulation reads: the shared one where it is."""
    return run(
        hidden_states=tensors["hidden_states"],
        encoder_hidden_states=tensors[STATES],
        encoder_hidden_states_mask=tensors[MASK],
        temb=modulation.block_embedding(tensors),
        image_rotary_emb=(tensors["rope_cos"], tensors["rope_sin"]),
    )


def environment(model: Any, dtype: torch.dtype) -> Environment:
    """The tensors of the program.

    timestep (sigma in [0, 1]), the mask (1 where text is) and rotary tables are float32 everywhere.
    """
    config = model.config
    width = model.inner_dim
    image, text = ("batch", "image_tokens"), ("batch", "text_tokens")
    rotary = Spec(torch.float32, ("tokens", config.attention_head_dim))
    passed = {MASK: Spec(torch.float32, text), "rope_cos": rotary, "rope_sin": rotary}
    inputs = {
        "hidden_states": Spec(dtype, (*image, config.in_channels)),
        STATES: Spec(dtype, (*text, config.joint_attention_dim)),
        "timestep": Spec(torch.float32, ("batch",)),
    }
    inner = {
        "hidden_states": Spec(dtype, (*image, width)),
        STATES: Spec(dtype, (*text, width)),
        "temb": Spec(dtype, ("batch", width)),
    }
    sample = Spec(dtype, (*image, model.proj_out.out_features))
    return inputs | passed, inner | modulation.spec(model, dtype) | passed, {"sample": sample}


# ---------------------------------------------------------------- the other components


def text_program(model: Any, dtype: torch.dtype) -> Program:
    """The language model of Qwen2_5_VLForConditionalGeneration: ids -> its last hidden states."""
    use_eager_attention(model)
    language = model.model.language_model

    def call(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Tensor:
        ids = tensors["input_ids"]
        masks = dict.fromkeys(language.config.layer_types, causal_mask(ids.shape[1], dtype))
        positions = torch.arange(ids.shape[1])[None, None].expand(3, ids.shape[0], -1)
        states: Tensor = run(
            input_ids=ids, attention_mask=masks, position_ids=positions, use_cache=False
        ).last_hidden_state
        return states

    states = Spec(dtype, ("batch", "text_tokens", language.config.hidden_size))
    outputs = {"states": states}
    kind = block_type("qwen", language, call, {"input_ids": IDS}, outputs, dtype)
    calls = [("qwen", "model.language_model.")]
    return Program({"qwen": kind}, calls, {"input_ids": IDS}, outputs)


def stored_name(name: str) -> str:
    """A parameter's name in files: transformers writes Qwen2.5-VL under its first release's."""
    for inside, written in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(inside):
            return written + name.removeprefix(inside)
    return name


def last_states(model: Any, output: Any) -> tuple[Tensor, ...]:
    """Of Qwen2_5_VLForConditionalGeneration, asked for its hidden states."""
    return (output.hidden_states[-1],)


def lengths(directory: Path) -> dict[str, int]:
    """Tokens of the template and of the prompt together."""
    return {"tokenizer": TEMPLATE_TOKENS + generation_defaults(directory)["max_sequence_length"]}


def latents(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], directory: Path
) -> dict[str, Any]:
    """The manifest's `latents`; ValueError for other components' or another kind of transformer."""
    if other := [name for name in VARIANTS if transformer.get(name)]:
        raise ValueError(
            f"{directory} has a transformer with {other[0]}, which text-to-image models have not"
            " and export does not compile; give a Qwen-Image pipeline that reads text alone."
        )
    channels = vae["z_dim"]
    check_packed(transformer, channels, directory)
    return {
        "channels": channels,
        "vae_scale_factor": 2 ** len(vae["temperal_downsample"]),
        "scaling_factor": 1.0,
        "mean": list(vae["latents_mean"]),
        "std": list(vae["latents_std"]),
        "patch": 2,
        "rope_axes": list(transformer["axes_dims_rope"]),
        "rope_theta": 10000,
    }


def text_tokens(lengths: Mapping[str, int]) -> dict[str, int]:
    """The transformer does not get the template's first tokens."""
    whole = lengths["tokenizer"]
    return {"": whole - TEMPLATE_TOKENS, "text_encoder": whole}


# ---------------------------------------------------------------- torch's side of parity


def text_mask(keywords: Mapping[str, Any]) -> Tensor:
    """The mask as the program takes it; the pipeline leaves out one that masks nothing."""
    if keywords[MASK] is None:
        return torch.ones(keywords[STATES].shape[:2])
    return keywords[MASK].float()


def block_inputs(keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """A block's keywords as the program's tensors: complex tables, the text's first, as real."""
    found = {name: keywords[name] for name in (*STREAMS, "temb")} | {MASK: text_mask(keywords)}
    turned = torch.cat(keywords["image_rotary_emb"][::-1]).repeat_interleave(2, dim=-1)
    return found | {"rope_cos": turned.real, "rope_sin": turned.imag}


def model_inputs(
    model: Any, keywords: Mapping[str, Any], first: Mapping[str, Any]
) -> dict[str, Any]:
    """The forward's keywords, with rotary tables in place of an image's shape."""
    found = {name: keywords[name] for name in (*STREAMS, "timestep")} | {MASK: text_mask(keywords)}
    return found | {name: first[name] for name in ("rope_cos", "rope_sin")}


def spatial(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Packed latents -> [n, C, h, w], as the VAE has them."""
    unpacked = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)[:, :, 0]
    config = pipe.vae.config
    mean, std = (
        torch.tensor(each).view(1, -1, 1, 1) for each in (config.latents_mean, config.latents_std)
    )
    return unpacked * std + mean


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """[n, C, h, w] -> [n, 3, H, W]: the only frame."""
    return first(pipe.vae, pipe.vae.decode(latents[:, :, None]))[0][:, :, 0]


def encode(pipe: Any, image: Tensor) -> Tensor:
    """[n, 3, H, W], the only frame -> [n, C, h, w]."""
    return latent_mean(pipe.vae, pipe.vae.encode(image[:, :, None]))[0][:, :, 0]


TEXT = (TRANSFORMERS, "Qwen2_5_VLForConditionalGeneration", text_program, last_states)
VAE = ("vae", "diffusers", "AutoencoderKLQwenImage")
QWEN = Family(
    name="qwen",
    components=(
        # 15 GB: its weights are read one by one.
        Encoder("text_encoder", "text_encoder", *TEXT, whole=False, stored_name=stored_name),
        None,
        Encoder("vae_decoder", *VAE, vae_program, first),
        Encoder("vae_encoder", *VAE, vae_encoder_program, latent_mean),
    ),
    tracing=Tracing(
        environment=environment,
        embed=Embed,
        final=Final,
        row=lambda block: Row("joint", BLOCK_INPUTS, STREAMS[::-1], call_block),
        processor=MaskedAttention,
    ),
    lengths=lengths,
    latents=latents,
    text_tokens=text_tokens,
    block_inputs=block_inputs,
    model_inputs=model_inputs,
    spatial=spatial,
    decode=decode,
    encode=encode,
)
