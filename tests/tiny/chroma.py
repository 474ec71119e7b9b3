"""A tiny but genuine Chroma pipeline: FLUX.1's tiny VAE and T5, an approximator of two layers."""

from __future__ import annotations

from typing import Any

from tests.tiny.pipeline import TRANSFORMER_CONFIG, build_pipeline, randomize, t5_tokenizer

LEFT_OUT = ("pooled_projection_dim", "guidance_embeds")  # FLUX.1's alone
CHROMA_CONFIG = {key: value for key, value in TRANSFORMER_CONFIG.items() if key not in LEFT_OUT} | {
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 24,
    "approximator_layers": 2,
}


def chroma_transformer(**more: Any) -> Any:
    from diffusers import ChromaTransformer2DModel

    return randomize(ChromaTransformer2DModel(**{**CHROMA_CONFIG, **more}), 0).eval()


def chroma() -> Any:
    """Chroma: masked texts, all modulation from one approximator."""
    from diffusers import ChromaPipeline

    base = build_pipeline()
    return ChromaPipeline(
        scheduler=base.scheduler,
        vae=base.vae,
        text_encoder=base.text_encoder_2,
        tokenizer=t5_tokenizer(),
        transformer=chroma_transformer(),
    )
