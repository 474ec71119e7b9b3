"""Tiny but genuine FLUX.1 Fill and FLUX.1 Canny pipelines: more channels in than out."""

from __future__ import annotations

from typing import Any

from tests.tiny.pipeline import build_pipeline, tiny_transformer

# Of 4 latent channels and a VAE of factor 2: 2 x 2 latents, the same of an image, a mask's pixels.
CHANNELS = {"FluxFillPipeline": 16 + 16 + 4 * 4, "FluxControlPipeline": 16 + 16}


def image_model(name: str) -> Any:
    """A pipeline of the class `name`, one of CHANNELS."""
    import diffusers

    parts = dict(build_pipeline().components)
    parts["transformer"] = tiny_transformer(in_channels=CHANNELS[name], out_channels=16)
    for other in ("image_encoder", "feature_extractor"):
        parts.pop(other, None)
    return getattr(diffusers, name)(**parts)
