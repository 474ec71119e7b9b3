"""A tiny but genuine Z-Image pipeline: Qwen3 without its head, FLUX's kind of VAE, two refiners."""

from __future__ import annotations

from typing import Any

from tests.tiny.flux2 import DECODER, qwen3_tokenizer
from tests.tiny.pipeline import build_pipeline, randomize

ZIMAGE_CONFIG = {
    "in_channels": 4,
    "dim": 48,  # FFNs of 128
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 24,
    "axes_dims": [4, 6, 6],
    "axes_lens": [96, 16, 16],
}


def zimage_transformer(**more: Any) -> Any:
    from diffusers import ZImageTransformer2DModel

    return randomize(ZImageTransformer2DModel(**{**ZIMAGE_CONFIG, **more}), 0).eval()


def zimage() -> Any:
    """Z-Image: texts of other lengths side by side, image and text each filled up to 32 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen3_tokenizer()
    config = Qwen3Config(**DECODER, vocab_size=len(tokenizer), num_hidden_layers=3)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_pipeline().vae,
        text_encoder=randomize(Qwen3Model(config), 2).eval(),
        tokenizer=tokenizer,
        transformer=zimage_transformer(),
    )
