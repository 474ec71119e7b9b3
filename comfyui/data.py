"""ComfyUI's data: IMAGE [B, H, W, C] and MASK [B, H, W], float32 torch tensors from 0 to 1.

White in a mask is repainted, in ComfyUI as in d2m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def to_images(image: Any) -> list[np.ndarray]:
    """IMAGE -> an array [H, W, 3] for each of its images; transparency is left out."""
    values = image.cpu().numpy()
    if values.ndim != 4 or values.shape[-1] not in (3, 4):
        raise ValueError(f"the image has shape {list(values.shape)}, expected [B, H, W, 3].")
    return list(np.clip(values[..., :3], 0, 1).astype(np.float32))


def to_masks(mask: Any, count: int) -> list[np.ndarray]:
    """MASK -> an array [H, W] for each of `count` images; one mask is for all of them."""
    values = mask.cpu().numpy()
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or len(values) not in (1, count):
        raise ValueError(
            f"the mask has shape {list(values.shape)}, expected [B, H, W] with one mask, or one"
            f" for each of {count} images."
        )
    return [values[i % len(values)].astype(np.float32) for i in range(count)]


def to_tensor(images: np.ndarray) -> Any:
    """Arrays [B, H, W, 3] -> IMAGE."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images, np.float32))


def on_progress() -> Callable[[str, int, int], None]:
    """For a pipeline's `progress`: ComfyUI's bar, and an exception where Cancel was pressed."""
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar

    bar: Any = None

    def report(phase: str, done: int, total: int) -> None:
        nonlocal bar
        throw_exception_if_processing_interrupted()
        if phase == "denoise":
            bar = bar or ProgressBar(total)
            bar.update_absolute(done, total)

    return report
