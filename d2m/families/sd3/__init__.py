"""Stable Diffusion 3 and 3.5: the row, and how the model and its pipeline are called.

Here too: `weights`, its list of weights for `d2m plan`; configs/, published configs.

Latents are not packed; three text encoders (two CLIPs, T5) write one text; guidance is
classifier-free, so a part of the captions that a student learns from is empty. The last block
writes no text and has no FFN for it. Letters: B batch, C latent channels, h x w latent pixels,
L text tokens (77 of the CLIPs before those of T5), P pooled width, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from d2m.families.encoders import CLIP_G, CLIP_L_PROJECTED, T5_XXL, VAE_16
from d2m.families.family import BlockLayout, Data, Family, Names, Plan, square_defaults
from d2m.families.flow import Batch, Config
from d2m.families.latents import grid, random_pooled_text, spatial_latents, spatial_noise
from d2m.families.sd3.weights import weights
from d2m.families.site import feed_forward

if TYPE_CHECKING:
    from torch import Tensor, nn

    from d2m.recipe.structure import Blocks

CONDITIONS = ("encoder_hidden_states", "pooled_projections")
LONGEST = 256  # read: StableDiffusion3Pipeline's max_sequence_length, tokens of T5
CLIP_TOKENS = 77
STEPS = 28  # read: the pipeline's default


def title_of(config: Config) -> str:
    """SD3, SD3.5 large (norms of queries and keys) or SD3.5 medium (two attentions a block)."""
    if not config.get("qk_norm"):
        return "Stable Diffusion 3"
    size = "medium" if config.get("dual_attention_layers") else "large"
    return f"Stable Diffusion 3.5 {size}"


def generation_defaults(read: Callable[[str], Config]) -> dict[str, Any]:
    """See d2m.families.generation_defaults; guidance 4.5 for 3.5 (read: its card) and 7.0 for 3."""
    guidance = 4.5 if read("transformer/config.json").get("qk_norm") else 7.0
    return square_defaults(read, "tokenizer_3", LONGEST, STEPS, guidance)


def check_blocks(blocks: Blocks, depth: Mapping[str, int]) -> None:
    """ValueError for a group that holds the last block: it hands no text on."""
    last = depth["double"] - 1
    for group in blocks.groups("double"):
        if last in group:
            raise ValueError(
                f"the recipe's group {list(group)} holds block {last}, the last of this model,"
                " which writes no text and so is never skipped for some samples; expected groups"
                f" of blocks 0 to {last - 1}: take it out of the group."
            )


# ---------------------------------------------------------------- the transformer


def inputs(model: nn.Module, batch: Batch, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Keyword inputs of forward. x [B, C, h, w], t [B] in [0, 1]: its timesteps are 1000 t."""
    found = {name: batch[name] for name in CONDITIONS}
    return found | {"hidden_states": x, "timestep": t * 1000}


def embedding(model: nn.Module, batch: Batch, t: Tensor) -> Tensor:
    """temb [B, D] of times t [B] in [0, 1] and pooled text [B, P]."""
    return model.time_text_embed(t * 1000, batch["pooled_projections"])  # type: ignore[operator]


# ---------------------------------------------------------------- the pipeline


def text_length(pipe: Any) -> int:
    """What T5's tokenizer takes, at most LONGEST."""
    return min(pipe.tokenizer_3.model_max_length, LONGEST)


def encode_text(pipe: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """States of the CLIPs and of T5 [B, L, width], and the CLIPs' pooled vectors [B, P]."""
    states, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def position_ids(pipe: Any, batch: Batch, height: int, width: int) -> dict[str, Tensor]:
    """`img_ids` [T, 3]."""
    patch = pipe.vae_scale_factor * pipe.patch_size
    return {"img_ids": grid(height // patch, width // patch, batch["latents"].device)}


SD3 = Family(
    names=Names(
        name="sd3",
        title="Stable Diffusion 3.5",
        pipelines=("StableDiffusion3Pipeline",),
        dense_class="SD3Transformer2DModel",
        sparse_class="SparseSD3Transformer2DModel",
        title_of=title_of,
        tags=("stable-diffusion-3",),
    ),
    blocks=BlockLayout(
        sites=(
            feed_forward("transformer_blocks", "ff", "image"),
            feed_forward("transformer_blocks", "ff_context", "text"),
        ),
        kinds=(("double", "transformer_blocks"),),
        depths=(("double", "num_layers"),),
        check_blocks=check_blocks,
    ),
    data=Data(
        inputs=inputs,
        embedding=embedding,
        random_text=random_pooled_text,
        text_length=text_length,
        encode_text=encode_text,
        encode_images=spatial_latents,
        position_ids=position_ids,
        noise=spatial_noise,
        prompt_embeds={
            "prompt_embeds": "encoder_hidden_states",
            "pooled_prompt_embeds": "pooled_projections",
        },
        unconditional=0.1,
    ),
    plan=Plan(
        # read: diffusers' defaults, for fields that a config leaves out
        sizes={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 18,
            "attention_head_dim": 64,
            "num_attention_heads": 18,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1152,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 96,
        },
        others=("dual_attention_layers", "qk_norm"),
        encoders={
            "text_encoder": CLIP_L_PROJECTED,
            "text_encoder_2": CLIP_G,
            "text_encoder_3": T5_XXL,
            "vae": VAE_16,
        },
        text_before=CLIP_TOKENS,
        weights=weights,
        generation_defaults=generation_defaults,
    ),
)
