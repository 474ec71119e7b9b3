"""Tiny but genuine FLUX.1 Kontext, Fill and Control pipelines, and pairs of pictures for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny.data import CAPTIONS, png
from tests.tiny.image_models import CHANNELS, image_model
from tests.tiny.pipeline import build_pipeline

EDITORS = ("FluxKontextPipeline", *CHANNELS)


def build_editor(name: str) -> Any:
    """A pipeline of the class `name`, one of EDITORS."""
    from diffusers import FluxKontextPipeline

    kontext = name == EDITORS[0]
    pipe = FluxKontextPipeline(**build_pipeline().components) if kontext else image_model(name)
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
