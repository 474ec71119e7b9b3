"""A LoRA file, read: for every Linear of a dense model that it changes, a product of two matrices.

Shape letters: O outputs and I inputs of a Linear, R rank.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2m.lora.names import PEFT, layers_of, split_key, without_prefix
from runtime.files.checked_json import read_json

CONFIG = "adapter_config.json"  # peft's
# Fields of it that make another product than up @ down, or let it count for some tokens only.
OTHER_KINDS = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)


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
    tensors; else as peft computes it from diffusers' metadata or from the adapter_config.json
    beside a file of peft's; 1 for a file in other names without either.

    FileNotFoundError or ValueError, in one sentence, if it is no such file, lacks a factor or its
    strength, names a layer twice or one that the model has not, or has other sizes or a NaN.
    """
    path = Path(path)
    tensors, metadata = _load(path)
    settings = _settings(path, metadata, any(key.startswith(PEFT) for key in tensors))
    files: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        try:
            name, factor = split_key(key)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; expected finite numbers.")
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
        try:
            scale = _scale(parts.get("alpha"), name, down.shape[0], settings)
        except (ValueError, TypeError, AttributeError, RuntimeError, re.error) as error:
            raise ValueError(f"{path}: the layer {name!r}: {error}") from error
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


def _settings(path: Path, metadata: Mapping[str, str], by_peft: bool) -> dict[str, Any] | None:
    """peft's config of the transformer's adapter, {} where the file says that scales are its own.

    From the metadata, where diffusers puts it, or the file beside, where peft does. None for a file
    of peft's names without either: its strength is known only where it has alpha tensors.
    """
    if written := metadata.get("lora_adapter_metadata"):
        try:
            told = {key.removeprefix("transformer."): v for key, v in json.loads(written).items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} has metadata that is no JSON ({error}).") from error
    elif (by_peft or path.stem == "adapter_model") and (path.parent / CONFIG).is_file():
        told = read_json(path.parent / CONFIG)
    else:
        return None if by_peft else {}
    if (kind := told.get("peft_type") or "LORA") != "LORA":
        raise ValueError(f"{path} is an adapter of the kind {kind}; expected a LORA.")
    for kind in OTHER_KINDS:
        if told.get(kind):
            raise ValueError(f"{path} was made with {kind}; expected a plain LoRA.")
    # These begin by changing the model's own weights, which the file does not hold.
    start = told.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal", "mica"):
        raise ValueError(
            f"{path} was made with init_lora_weights {start!r}, which changes the model's own "
            "weights too; expected a plain LoRA: save it with "
            "path_initial_model_for_weight_conversion."
        )
    return {"r": 8, "lora_alpha": 8} | told  # LoraConfig's defaults


def _scale(alpha: Tensor | None, name: str, rank: int, settings: Mapping[str, Any] | None) -> float:
    """A layer's scale; ValueError, or what Python raises for settings of another type."""
    if alpha is not None:
        return float(alpha) / rank
    if settings is None:
        raise ValueError(
            f"peft writes its strength (lora_alpha) into {CONFIG}, which is not there; expected "
            "that file beside the LoRA."
        )
    if not settings:
        return 1.0

    def told(field: str, pattern: str) -> float:
        rows = (settings.get(pattern) or {}).items()
        # As peft matches them: the first one that fits the end of a name.
        fits = (v for key, v in rows if re.match(rf"(.*\.)?({key})$", without_prefix(name)))
        return float(next(fits, settings[field]))

    if told("r", "rank_pattern") != rank:
        raise ValueError(
            f"rank {rank} where its config says {told('r', 'rank_pattern'):g}; expected the config "
            "that was saved with it."
        )
    scale = told("lora_alpha", "alpha_pattern") / (
        math.sqrt(rank) if settings.get("use_rslora") else rank
    )
    if not math.isfinite(scale):
        raise ValueError(f"its config's lora_alpha makes a strength of {scale}; expected a number.")
    return scale
