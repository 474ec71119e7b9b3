"""An adapter's file, read: for every Linear of a dense model that it changes, what it adds.

Shape letters: O outputs and I inputs of a Linear, R rank.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.files.checked_json import parse_json, read_json
from runtime.files.tensors import SafeTensors
from runtime.lora.changes import Change, Hadamard, Kronecker, LowRank
from runtime.lora.names import PEFT, layers_of, split_key, without_prefix

# Factors of a product -> what kind of adapter has them, and which make a whole one.
FACTOR_KINDS = {
    **dict.fromkeys(("up", "down"), "lora"),
    **{f"hada_w{i}_{half}": "hada" for i in (1, 2) for half in "ab"},
    **{f"lokr_w{i}{half}": "lokr" for i in (1, 2) for half in ("", "_a", "_b")},
}
COMPLETE: dict[str, list[set[str]]] = {
    "": [],
    "lora": [{"up", "down"}],
    "hada": [{f"hada_w{i}_{half}" for i in (1, 2) for half in "ab"}],
    "lokr": [
        {*first, *second}
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ],
}
CONFIG = "adapter_config.json"  # peft's
# Fields of it that make another product than up @ down, or let it count for some tokens only.
OTHER_KINDS = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)


def read_lora(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Change]:
    """What a safetensors file in the names of runtime.lora.names changes: Linear -> Change.

    shapes: (O, I) of every Linear of the dense model. The scale is alpha / R, from the file's alpha
    tensors; else as peft computes it from diffusers' metadata or from the adapter_config.json
    beside a file of peft's; 1 for a file in other names without either.

    FileNotFoundError or ValueError, in one sentence, if it is no such file, lacks a factor or its
    strength, names a layer twice or one that the model has not, or has other sizes or a NaN.
    """
    path = Path(path)
    tensors, metadata = _load(path)
    settings = _settings(path, metadata, any(key.startswith(PEFT) for key in tensors))
    files: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, tensor in tensors.items():
        try:
            name, factor = split_key(key)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not np.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; expected finite numbers.")
        files[name][factor] = tensor
    found: dict[str, Change] = {}
    for name, parts in files.items():
        try:
            layers, swapped = layers_of(name, shapes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        outputs = [shapes[layer][0] for layer in layers]
        expected = (sum(outputs), shapes[layers[0]][1])
        try:
            change = change_of(name, parts, expected, settings)
        except (ValueError, TypeError, AttributeError, RuntimeError, re.error) as error:
            raise ValueError(f"{path}: the layer {name!r}: {error}") from error
        if swapped:
            halves = np.arange(expected[0]).reshape(2, -1)[::-1]
            change = change.take(halves.reshape(-1))
        begin = 0
        for layer, count in zip(layers, outputs):
            if layer in found:
                raise ValueError(f"{path} changes {layer} twice, under two names; expected one.")
            rows = np.arange(begin, begin + count)
            found[layer] = change if len(layers) == 1 else change.take(rows)
            begin += count
    if not found:
        raise ValueError(f"{path} holds no LoRA; expected keys such as ... lora_A.weight.")
    return found


def change_of(
    name: str,
    parts: Mapping[str, np.ndarray],
    expected: tuple[int, int],
    settings: Mapping[str, Any] | None,
) -> Change:
    """The change that a layer's factors make; ValueError (a clause), or what Python raises for
    settings of another type."""
    alpha = parts.get("alpha")
    kinds = {FACTOR_KINDS[factor] for factor in parts if factor != "alpha"}
    if len(kinds) != 1 or not any(want <= set(parts) for want in COMPLETE[min(kinds, default="")]):
        raise ValueError(
            f"it holds only {', '.join(sorted(parts))}; expected all factors of one product: copy"
            " the file again."
        )
    if any(array.ndim != 2 for factor, array in parts.items() if factor != "alpha"):
        raise ValueError("it has factors that are no matrices; expected those of a Linear.")

    def scale(rank: int) -> float:
        return _scale(alpha, name, rank, settings)

    def low(up: str, down: str, by: float) -> LowRank:
        if parts[up].shape[1] != parts[down].shape[0]:
            raise wrong_shapes(parts, expected)
        return LowRank(parts[up], parts[down], by)

    change: Change
    if "lora" in kinds:
        change = low("up", "down", 1.0)
        if change.shape == expected:
            change = low("up", "down", scale(change.rank))
    elif "hada" in kinds:
        first, second = (low(f"hada_w{i}_a", f"hada_w{i}_b", 1.0) for i in (1, 2))
        if first.shape != second.shape:
            raise wrong_shapes(parts, expected)
        change = Hadamard(first, second, scale(first.rank))
    else:
        ranks, sides = [], []
        for side in ("lokr_w1", "lokr_w2"):
            if side in parts:
                sides.append(parts[side])
            else:
                product = low(f"{side}_a", f"{side}_b", 1.0)
                ranks.append(product.rank)
                sides.append(product.part(None, None, np.float32))
        # read (LyCORIS): two whole matrices have no rank, and no strength of their own.
        change = Kronecker(sides[0], sides[1], scale(ranks[-1]) if ranks else 1.0)
    if change.shape != expected:
        raise wrong_shapes(parts, expected)
    return change


def wrong_shapes(parts: Mapping[str, np.ndarray], expected: tuple[int, int]) -> ValueError:
    """Factors that do not go together, or are of a layer of another size."""
    shapes = [str(list(parts[factor].shape)) for factor in FACTOR_KINDS if factor in parts]
    return ValueError(
        f"it has factors of shape {' and '.join(shapes)}; expected [{expected[0]}, R] and"
        f" [R, {expected[1]}], or what makes a matrix of that size: is the LoRA made for another"
        " model?"
    )


def _load(path: Path) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """Tensors, bfloat16 as float32, and the header's metadata."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; expected a LoRA as .safetensors.")
    try:
        opened = SafeTensors(path)
        with open(path, "rb") as file:
            header = parse_json(file.read(int.from_bytes(file.read(8), "little")))
    except ValueError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}); expected a LoRA as .safetensors, "
            "nothing is unpickled."
        ) from error
    return {name: opened.array(name) for name in opened.tensors}, header.get("__metadata__", {})


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


def _scale(
    alpha: np.ndarray | None, name: str, rank: int, settings: Mapping[str, Any] | None
) -> float:
    """A layer's scale; ValueError, or what Python raises for settings of another type."""
    if alpha is not None:
        return float(alpha.reshape(())) / rank
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
