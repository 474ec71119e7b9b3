"""A LoRA file, read: for every Linear of a dense model that it changes, a product of two matrices.

Shape letters: O outputs and I inputs of a Linear, R rank.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2m.lora.names import layers_of, split_key


@dataclass(frozen=True)
class LowRank:
    """The change `scale * up @ down` of a weight [O, I]: up [O, R], down [R, I]."""

    up: Tensor
    down: Tensor
    scale: float

    def part(self, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
        """These rows and columns (None: all) of the change, computed in `dtype`."""
        up, down = self._factors(rows, columns, dtype)
        return self.scale * (up @ down)

    def squared_norm(self, rows: Tensor | None, columns: Tensor | None) -> float:
        """Their squared Frobenius norm, in float64, without making the product."""
        up, down = self._factors(rows, columns, torch.float64)
        return float(self.scale**2 * ((up.T @ up) * (down @ down.T)).sum())

    def _factors(
        self, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        up = self.up if rows is None else self.up[rows]
        down = self.down if columns is None else self.down[:, columns]
        return up.to(dtype), down.to(dtype)


def read_lora(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, LowRank]:
    """What a safetensors file in diffusers', peft's or kohya's names changes: Linear -> LowRank.

    shapes: (O, I) of every Linear of the dense model. The scale is alpha / R, from the file's alpha
    tensors or diffusers' metadata; 1 without either.

    FileNotFoundError or ValueError, in one sentence, if it is no such file, lacks a factor, names a
    layer twice or one that the model has not, or has other sizes.
    """
    tensors, metadata = _load(Path(path))
    settings = _settings(metadata, path)
    files: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        try:
            name, factor = split_key(key)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        files[name][factor] = tensor
    found: dict[str, LowRank] = {}
    for name, parts in files.items():
        try:
            layers, swapped = layers_of(name, shapes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if "up" not in parts or "down" not in parts:
            raise ValueError(
                f"{path} holds only {', '.join(parts)} of the layer {name!r}; expected both "
                "factors of the product: copy the file again."
            )
        up, down = parts["up"], parts["down"]
        outputs = [shapes[layer][0] for layer in layers]
        expected = (sum(outputs), shapes[layers[0]][1])
        flat = up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0]
        if not flat or (up.shape[0], down.shape[1]) != expected:
            raise ValueError(
                f"{path}: the layer {name!r} has factors of shape {list(up.shape)} and "
                f"{list(down.shape)}; expected [{expected[0]}, R] and [R, {expected[1]}]: is the "
                "LoRA made for another model?"
            )
        if swapped:
            up = torch.cat(up.chunk(2)[::-1])
        scale = _scale(parts.get("alpha"), layers[0], down.shape[0], settings)
        for layer, rows in zip(layers, up.split(outputs)):
            if layer in found:
                raise ValueError(f"{path} changes {layer} twice, under two names; expected one.")
            found[layer] = LowRank(rows, down, scale)
    if not found:
        raise ValueError(f"{path} holds no LoRA; expected keys such as ... lora_A.weight.")
    return found


def _load(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; expected a LoRA as .safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}); expected a LoRA as .safetensors, "
            "nothing is unpickled."
        ) from error


def _settings(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    """peft's config of the transformer's adapter, where diffusers has put it into the metadata."""
    try:
        told = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        settings = {key.removeprefix("transformer."): value for key, value in told.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} has metadata that is no JSON ({error}).") from error
    for kind in ("use_dora", "lora_bias"):
        if settings.get(kind):
            raise ValueError(f"{path} was made with {kind}; expected a plain LoRA.")
    return settings


def _scale(alpha: Tensor | None, layer: str, rank: int, settings: Mapping[str, Any]) -> float:
    if alpha is not None:
        return float(alpha) / rank
    told = settings.get("lora_alpha")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?{pattern}", layer):  # as peft matches them
            told = value
    if told is None:
        return 1.0
    return float(told) / (rank**0.5 if settings.get("use_rslora") else rank)
