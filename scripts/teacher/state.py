"""Training state in one safetensors file: never half written, never pickle.

    model.NAME    weights
    ema.NAME      their exponential average, where the stage keeps one
    opt0.I.NAME   AdamW's tensors (step, exp_avg, exp_avg_sq) of parameter number I

Numbers that are not tensors (the step) travel in the header, as JSON under "meta".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from runtime.files.atomic import write_bytes


def save_state(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors of any device and layout, and what JSON can hold, to `path` at once.

    Every tensor is cloned: T5 shares its embedding between two names, which the format refuses.
    """
    own = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    write_bytes(path, save(own, metadata={"meta": json.dumps(meta)}))


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Undo `save_state`: (tensors on the CPU, meta)."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    return load_file(path), meta


def gather(
    model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Everything a stage needs to go on, under the names this file's head lists."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    for number, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            if torch.is_tensor(value):
                tensors[f"opt0.{number}.{name}"] = value
    return tensors


def restore(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Undo `gather`, in place."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    model.load_state_dict(parts["model"])
    if ema is not None:
        ema.load_state_dict(parts["ema"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in parts.get("opt0", {}).items():
        number, moment = name.split(".", 1)
        moments.setdefault(int(number), {})[moment] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
