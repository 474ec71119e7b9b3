"""Tiny but genuine pipelines of every family: the real classes, random weights everywhere.

A family is a row of FAMILIES: how its pipeline is built, and what its tests need to know of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tiny import (
    IMAGE_SIZE,
    MAX_SEQUENCE_LENGTH,
    build_pipeline,
    clip_tokenizer,
    randomize,
    t5_tokenizer,
    tiny_transformer,
)

SD3_CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 80,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 72,
    "out_channels": 4,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


@dataclass(frozen=True)
class Tiny:
    """A family's tiny pipeline.

    build(): the pipeline in memory; title: what d2m calls it; groups: blocks of a group that it can
    have; refused: blocks of one that it cannot have, or (); kinds: block types of its program.
    """

    build: Callable[[], Any]
    family: str
    title: str
    groups: dict[str, list[list[int]]]
    kinds: tuple[str, ...]
    refused: dict[str, list[list[int]]] | None = None


def schnell() -> Any:
    """FLUX.1 [schnell]: no guidance embedding, a scheduler without dynamic shifting."""
    pipe = build_pipeline()
    pipe.register_modules(transformer=tiny_transformer(guidance_embeds=False))
    return pipe


def sd3() -> Any:
    """SD3.5 medium's ways: a block with a second attention, norms of queries and keys."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    base = build_pipeline()
    t5 = t5_tokenizer()
    t5_config = T5Config(**{**base.text_encoder_2.config.to_dict(), "d_model": 80})
    transformer = SD3Transformer2DModel(**SD3_CONFIG)
    return StableDiffusion3Pipeline(
        transformer=randomize(transformer, 0).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=base.vae,
        text_encoder=clip(CLIPTextModelWithProjection, 4, 32),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 5, 40),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=randomize(T5EncoderModel(t5_config), 6).eval(),
        tokenizer_3=t5,
    )


def clip(cls: Any, seed: int, width: int) -> Any:
    """A CLIP text encoder with a projection as wide as itself."""
    from transformers import CLIPTextConfig

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_SEQUENCE_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )
    return randomize(cls(config), seed).eval()


FAMILIES = {
    "schnell": Tiny(
        schnell,
        "flux",
        "FLUX.1 [schnell]",
        {"double": [[0, 1]], "single": [[0, 1]]},
        ("embed", "double", "double", "single", "single", "final"),
    ),
    "sd3": Tiny(
        sd3,
        "sd3",
        "Stable Diffusion 3.5 medium",
        {"double": [[0, 1]]},
        ("embed", "dual", "joint", "last", "final"),
        refused={"double": [[1, 2]]},
    ),
}
SIZE = IMAGE_SIZE
