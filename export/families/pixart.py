"""PixArt-Sigma for export: the transformer's ends and blocks, its text encoder and VAE.

The graphs take patches of latents as tokens, and what is added for their positions as an input, so
no size of an image is in them. All blocks read one modulation [B, 6 D], which the embed call
writes, and a mask of the text, 1 at tokens and 0 at padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m.families.generation_defaults import generation_defaults
from d2m.families.pixart.weights import check_conditions
from export.families.encoders import MASKED_T5, VAE
from export.families.ends import kl_latents, patches, sample_patches, unscaled
from export.families.family import Family
from export.graph.attention import attended, heads
from export.graph.program import MODULATION, Environment, Row, Tracing
from export.graph.trace import Spec

MASK = "encoder_attention_mask"
BLOCK_INPUTS = ("hidden_states", "encoder_hidden_states", MASK, MODULATION)
MASKED = -10000.0  # read: what diffusers adds to scores of padding; exp of it is 0


class Embed(nn.Module):
    """What PixArtTransformer2DModel does before its blocks; parameter names are the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pos_embed = model.pos_embed
        self.adaln_single = model.adaln_single
        self.caption_projection = model.caption_projection

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, ...]:
        """-> image tokens [B, T, D], text tokens [B, L, D], temb [B, D], modulation [B, 6 D].

        hidden_states [B, T, C p p]: patches, a channel after the other; positions [T, D] float32;
        timestep [B]: 0 to 999.
        """
        projection, single = self.pos_embed.proj, self.adaln_single
        image = F.linear(hidden_states, projection.weight.flatten(1), projection.bias)
        image = (image + positions).to(image.dtype)
        temb = single.emb(
            timestep, None, None, batch_size=len(timestep), hidden_dtype=hidden_states.dtype
        )
        text = self.caption_projection(encoder_hidden_states)
        return image, text, temb, single.linear(F.silu(temb))


class Final(nn.Module):
    """What PixArtTransformer2DModel does after its blocks, before patches are joined."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm_out = model.norm_out
        self.scale_shift_table = model.scale_shift_table
        self.proj_out = model.proj_out

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """[B, T, D], [B, D] -> [B, T, p p 2 C], all channels of a pixel together."""
        shift, scale = (self.scale_shift_table[None] + temb[:, None]).chunk(2, dim=1)
        return self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)


class Attention:
    """Processor for Attention with fused projections: of tokens to themselves, or to the text.

    The same arithmetic as diffusers' AttnProcessor2_0, in the form of export/graph/attention.py.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, T, D], text [B, L, D], mask [B, 1, L] to be added -> [B, T, D]."""
        size = attn.inner_dim // attn.heads
        if encoder_hidden_states is None:
            query, key, value = heads(attn.to_qkv(hidden_states), size)
        else:
            query = attn.to_q(hidden_states).unflatten(-1, (-1, size)).transpose(1, 2)
            pair = attn.to_kv(encoder_hidden_states).unflatten(-1, (2, -1, size))
            stacked = pair.permute(2, 0, 3, 1, 4)
            key, value = stacked[0], stacked[1]
        bias = None if attention_mask is None else attention_mask[:, None]
        return attn.to_out[0](attended(query, key, value, bias))


def call_block(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """A block: -> image."""
    return run(
        hidden_states=tensors["hidden_states"],
        encoder_hidden_states=tensors["encoder_hidden_states"],
        encoder_attention_mask=(1 - tensors[MASK])[:, None] * MASKED,
        timestep=tensors[MODULATION],
    )


def environment(model: Any, dtype: torch.dtype) -> Environment:
    """The tensors of the program; timestep and positions are float32 in any bundle."""
    config = model.config
    width, area = model.inner_dim, config.patch_size**2
    image, text = ("batch", "image_tokens"), ("batch", "text_tokens")
    mask = Spec(dtype, text)
    inputs = {
        "hidden_states": Spec(dtype, (*image, area * config.in_channels)),
        "encoder_hidden_states": Spec(dtype, (*text, config.caption_channels)),
        MASK: mask,
        "timestep": Spec(torch.float32, ("batch",)),
        "positions": Spec(torch.float32, ("image_tokens", width)),
    }
    inner = {
        "hidden_states": Spec(dtype, (*image, width)),
        "encoder_hidden_states": Spec(dtype, (*text, width)),
        "temb": Spec(dtype, ("batch", width)),
        MODULATION: Spec(dtype, ("batch", 6 * width)),
        MASK: mask,
    }
    sample = Spec(dtype, (*image, model.proj_out.out_features))
    return inputs, inner, {"sample": sample}


def lengths(directory: Path) -> dict[str, int]:
    """Tokens of T5."""
    return {"tokenizer": generation_defaults(directory)["max_sequence_length"]}


def latents(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], directory: Path
) -> dict[str, Any]:
    """The manifest's `latents`; `base` tokens a side are what positions are scaled to."""
    check_conditions(transformer)
    channels, outputs = vae["latent_channels"], transformer.get("out_channels")
    if transformer.get("in_channels") != channels or outputs != 2 * channels:
        raise ValueError(
            f"{directory} has a transformer of {transformer.get('in_channels')} input and"
            f" {outputs} output channels and a VAE of {channels}, expected as many and twice as"
            " many; the components are of different models."
        )
    side, patch = transformer["sample_size"], transformer["patch_size"]
    scale = transformer.get("interpolation_scale")
    return kl_latents(vae) | {
        "patch": patch,
        "base": side // patch,
        "interpolation": max(side // 64, 1) if scale is None else scale,
        "width": transformer["num_attention_heads"] * transformer["attention_head_dim"],
    }


# ---------------------------------------------------------------- torch's side of parity


def block_inputs(keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """A block's keywords as the program's tensors."""
    found = {name: keywords[name] for name in BLOCK_INPUTS[:2]}
    mask = (keywords[MASK][:, 0] == 0).to(found["hidden_states"].dtype)
    return found | {MASK: mask, MODULATION: keywords["timestep"]}


def model_inputs(
    model: Any, keywords: Mapping[str, Any], first: Mapping[str, Any]
) -> dict[str, Any]:
    """The forward's keywords: latents cut into patches, and what their positions add."""
    embed, latents = model.pos_embed, keywords["hidden_states"]
    # What PatchEmbed adds, by itself: of no latents it is the projection's bias and the positions.
    added = embed(torch.zeros_like(latents[:1]))[0] - embed.proj.bias
    return {
        "hidden_states": patches(latents, model.config.patch_size),
        "encoder_hidden_states": keywords["encoder_hidden_states"],
        MASK: keywords[MASK].to(latents.dtype),
        "timestep": keywords["timestep"].float(),
        "positions": added,
    }


def unread(model: Any, keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """temb, of which blocks get the modulation alone."""
    times, dtype = keywords["timestep"], keywords["hidden_states"].dtype
    emb = model.adaln_single.emb
    return {"temb": emb(times, None, None, batch_size=len(times), hidden_dtype=dtype)}


PIXART = Family(
    name="pixart",
    components=(MASKED_T5, None, *VAE),
    tracing=Tracing(
        environment=environment,
        embed=Embed,
        final=Final,
        row=lambda block: Row("cross", BLOCK_INPUTS, ("hidden_states",), call_block),
        processor=Attention,
    ),
    lengths=lengths,
    latents=latents,
    text_tokens=lambda lengths: {"": lengths["tokenizer"], "text_encoder": lengths["tokenizer"]},
    block_inputs=block_inputs,
    model_inputs=model_inputs,
    unread=unread,
    sample=sample_patches,
    spatial=unscaled,
    scheduler="DPMSolverMultistepScheduler",
)
