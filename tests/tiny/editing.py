"""Tiny but genuine FLUX.1 Kontext, Fill and Control pipelines, and pairs of pictures for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny.data import CAPTIONS, png
from tests.tiny.pipeline import build_pipeline, tiny_transformer

# Channels of the transformer's input: noise; with the masked image and its mask; with the control.
CHANNELS = {"FluxKontextPipeline": 16, "FluxFillPipeline": 48, "FluxControlPipeline": 32}


def build_editor(name: str, seed: int = 0) -> Any:
    """The pipeline of that class, of the parts of the tiny FluxPipeline."""
    import diffusers

    parts = dict(build_pipeline(seed).components)
    if CHANNELS[name] != 16:
        parts["transformer"] = tiny_transformer(seed, in_channels=CHANNELS[name], out_channels=16)
    parts |= {each: parts.pop(each) for each in ("image_encoder", "feature_extractor")}
    if name != "FluxKontextPipeline":
        del parts["image_encoder"], parts["feature_extractor"]
    pipe = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pairs(path: Path, count: int = 6) -> Path:
    """COUNT edits: NAME.before.png, NAME.after.png, NAME.txt, every third with a NAME.mask.png."""
    path.mkdir(parents=True)
    for i in range(count):
        (path / f"{i}.before.png").write_bytes(png(i))
        (path / f"{i}.after.png").write_bytes(png(100 + i))
        (path / f"{i}.txt").write_text(CAPTIONS[i] + "\n")
        if i % 3 == 0:
            (path / f"{i}.mask.png").write_bytes(png(200 + i))
    return path
