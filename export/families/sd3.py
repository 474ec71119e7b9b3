"""Stable Diffusion 3 and 3.5 for export: the transformer's ends and blocks, its text encoders, VAE.

The graphs take patches of latents as tokens, as FLUX's do, so that no size of an image is in them:
the runtime cuts and joins patches. Where a token is, the input `positions` says: rows of the
model's own table of embeddings, which is a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m.families.generation_defaults import generation_defaults
from d2m.model.block_group import SkippedBlock
from d2m.model.modulation import SharedAdaLN
from export.families import modulation
from export.families.configs import config
from export.families.encoders import (
    T5,
    TRANSFORMERS,
    VAE,
    clip_projection_program,
    pooled_and_states,
)
from export.families.ends import Final, kl_latents, patches, sample_patches, unscaled
from export.families.family import Encoder, Family
from export.graph.attention import attended, heads, rms_norm
from export.graph.program import MODULATION, Environment, Row, Tracing
from export.graph.trace import Spec

STREAMS = ("hidden_states", "encoder_hidden_states")
BLOCK_INPUTS = (*STREAMS, "temb")


class Embed(nn.Module):
    """What SD3Transformer2DModel does before its blocks; parameter names are the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pos_embed = model.pos_embed
        self.context_embedder = model.context_embedder
        self.time_text_embed = model.time_text_embed
        modulation.attach(model, self)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, ...]:
        """-> image tokens [B, T, D], text tokens [B, Tt, D], temb [B, D], maybe modulation.

        hidden_states [B, T, C p p]: patches, a channel after the other; positions [T]: rows of the
        table; timestep [B]: 0 to 1000.
        """
        image = embed_patches(self.pos_embed, hidden_states, positions)
        temb = self.time_text_embed(timestep, pooled_projections)
        text = self.context_embedder(encoder_hidden_states)
        return image, text, temb, *modulation.output(self, temb)


def embed_patches(patches: Any, hidden_states: Tensor, positions: Tensor) -> Tensor:
    """Patches [B, T, C p p] -> tokens [B, T, D], with the table's rows `positions` [T] added."""
    image = F.linear(hidden_states, patches.proj.weight.flatten(1), patches.proj.bias)
    return (image + patches.pos_embed[0][positions]).to(image.dtype)


class JointAttention:
    """Processor for SD3's Attention with fused projections: the image's tokens before the text's.

    The same arithmetic as diffusers' JointAttnProcessor2_0, in the form of
    export/graph/attention.py.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states [B, T, D] (and text [B, Tt, D]) -> outputs of the same shapes."""
        size = attn.inner_dim // attn.heads
        query, key, value = heads(attn.to_qkv(hidden_states), size)
        query, key = normed(query, attn.norm_q), normed(key, attn.norm_k)
        if encoder_hidden_states is not None:
            text = heads(attn.to_added_qkv(encoder_hidden_states), size)
            query = torch.cat([query, normed(text[0], attn.norm_added_q)], dim=2)
            key = torch.cat([key, normed(text[1], attn.norm_added_k)], dim=2)
            value = torch.cat([value, text[2]], dim=2)
        output = attended(query, key, value)
        if encoder_hidden_states is None:
            return attn.to_out[0](output)
        length = hidden_states.shape[1]
        words = output[:, length:]
        if not attn.context_pre_only:
            words = attn.to_add_out(words)
        return attn.to_out[0](output[:, :length]), words


def normed(x: Tensor, norm: Any) -> Tensor:
    """The norm of queries or keys, where the model has one."""
    return x if norm is None else rms_norm(x, norm)


def prepare(model: Any) -> None:
    """The table of positions becomes a weight; the last block's temb holds the modulation too.

    Of the last block the image's norm reads shared modulation [B, r] and the text's temb [B, D],
    but a block has one argument for both: they lie side by side there.
    """
    table_as_weight(model.pos_embed)
    block = model.transformer_blocks[-1]
    if not isinstance(block, SkippedBlock) and isinstance(block.norm1, SharedAdaLN):
        size = model.modulation.linear.out_features
        taken: Any = lambda emb: emb[:, :size]  # noqa: E731
        block.norm1._shared = (taken,)
        block.norm1_context.register_forward_pre_hook(lambda _, args: (args[0], args[1][:, size:]))


def table_as_weight(patches: Any) -> None:
    """A PatchEmbed's table of positions becomes a parameter, in place."""
    patches.pos_embed = nn.Parameter(patches._buffers.pop("pos_embed"), requires_grad=False)


def call_block(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """A block: -> (text, image). temb is what its norms read: shared modulation where it is."""
    return run(
        hidden_states=tensors["hidden_states"],
        encoder_hidden_states=tensors["encoder_hidden_states"],
        temb=modulation.block_embedding(tensors),
    )


def call_last(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """The last block: -> image. See `prepare`."""
    temb = [tensors[name] for name in (MODULATION, "temb") if name in tensors]
    return run(
        hidden_states=tensors["hidden_states"],
        encoder_hidden_states=tensors["encoder_hidden_states"],
        temb=torch.cat(temb, dim=-1),
    )[1]


def row(block: nn.Module) -> Row:
    """Blocks with one attention, with two, and the last."""
    if block.context_pre_only:
        both = (*BLOCK_INPUTS, MODULATION) if isinstance(block.norm1, SharedAdaLN) else BLOCK_INPUTS
        return Row("last", both, STREAMS[:1], call_last)
    kind = "dual" if block.use_dual_attention else "joint"
    return Row(kind, BLOCK_INPUTS, STREAMS[::-1], call_block)


def environment(model: Any, dtype: torch.dtype) -> Environment:
    """The tensors of the program; timestep is float32 in any bundle, positions int64."""
    config = model.config
    width, area = model.inner_dim, config.patch_size**2
    image, text = ("batch", "image_tokens"), ("batch", "text_tokens")
    inputs = {
        "hidden_states": Spec(dtype, (*image, area * config.in_channels)),
        "encoder_hidden_states": Spec(dtype, (*text, config.joint_attention_dim)),
        "pooled_projections": Spec(dtype, ("batch", config.pooled_projection_dim)),
        "timestep": Spec(torch.float32, ("batch",)),
        "positions": Spec(torch.int64, ("image_tokens",)),
    }
    inner = {
        "hidden_states": Spec(dtype, (*image, width)),
        "encoder_hidden_states": Spec(dtype, (*text, config.caption_projection_dim)),
        "temb": Spec(dtype, ("batch", width)),
    }
    sample = Spec(dtype, (*image, model.proj_out.out_features))
    return inputs, inner | modulation.spec(model, dtype), {"sample": sample}


def lengths(directory: Path) -> dict[str, int]:
    """Tokens of both CLIPs, and of T5."""
    clip = config(directory, "text_encoder")["max_position_embeddings"]
    longest = generation_defaults(directory)["max_sequence_length"]
    return {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": longest}


def latents(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], directory: Path
) -> dict[str, Any]:
    """The manifest's `latents`; `grid` is the side of the table of positions."""
    channels = vae["latent_channels"]
    if transformer.get("in_channels") != channels:
        raise ValueError(
            f"{directory} has a transformer of {transformer.get('in_channels')} input channels and"
            f" a VAE of {channels}, expected as many; the components are of different models."
        )
    return kl_latents(vae) | {
        "shift_factor": vae.get("shift_factor"),
        "patch": transformer["patch_size"],
        "grid": transformer["pos_embed_max_size"],
    }


def text_tokens(lengths: Mapping[str, int]) -> dict[str, int]:
    """The transformer reads the CLIPs' tokens and T5's, one after the other."""
    clip, t5 = lengths["tokenizer"], lengths["tokenizer_3"]
    own = {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": t5}
    return {"": clip + t5, **own}


# ---------------------------------------------------------------- torch's side of parity


def block_inputs(keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """A block's keywords as the program's tensors."""
    return {name: keywords[name] for name in BLOCK_INPUTS}


def model_inputs(
    model: Any, keywords: Mapping[str, Any], first: Mapping[str, Any]
) -> dict[str, Any]:
    """The forward's keywords: latents cut into patches, and where these are."""
    config, latents = model.config, keywords["hidden_states"]
    patch, grid = config.patch_size, config.pos_embed_max_size
    rows = torch.arange(grid * grid).view(grid, grid)
    height, width = (side // patch for side in latents.shape[-2:])
    top, left = (grid - height) // 2, (grid - width) // 2
    found = {n: keywords[n] for n in ("encoder_hidden_states", "pooled_projections", "timestep")}
    return found | {
        "hidden_states": patches(latents, patch),
        "positions": rows[top : top + height, left : left + width].reshape(-1),
    }


CLIP = (TRANSFORMERS, "CLIPTextModelWithProjection", clip_projection_program, pooled_and_states)
SD3 = Family(
    name="sd3",
    components=(
        Encoder("text_encoder", "text_encoder", *CLIP),
        Encoder("text_encoder_2", "text_encoder_2", *CLIP),
        Encoder("text_encoder_3", "text_encoder_3", *T5, whole=False),
        None,
        *VAE,
    ),
    tracing=Tracing(
        environment=environment,
        embed=Embed,
        final=Final,
        row=row,
        processor=JointAttention,
        prepare=prepare,
    ),
    lengths=lengths,
    latents=latents,
    text_tokens=text_tokens,
    block_inputs=block_inputs,
    model_inputs=model_inputs,
    sample=sample_patches,
    spatial=unscaled,
)
