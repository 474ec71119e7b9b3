"""Where every Linear of the dense model lies in a bundle, for LoRAs at run time.

As `d2m lora` maps a LoRA onto a checkpoint (d2m.lora.parts), written down: lora.json and the
neurons' order, lora.safetensors, which runtime.lora.placement reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2m.families import family_of
from d2m.lora.parts import Part, dense_linears, parts_of
from d2m.shards import open_shards
from export.checkpoint.weights import Placed
from runtime.files.atomic import write_chunks, write_json
from runtime.files.checked_json import read_json
from runtime.files.tensors import file_chunks

if TYPE_CHECKING:
    from torch import Tensor

MAP, INDICES = "lora.json", "lora.safetensors"


def write_lora_map(folder: Path, source: Path, placed: Iterable[Placed]) -> dict[str, str]:
    """lora.json and lora.safetensors in `folder`; returns the manifest's record of them.

    source: the pipeline directory; placed: all tensors of the transformer's program.
    """
    family = family_of(source)
    config = read_json(source / "transformer" / "config.json")
    shards = open_shards(source / "transformer")
    shapes = shards.shapes
    homes: dict[str, tuple[Placed, int]] = {}  # checkpoint's tensor -> bundle's, first row
    for row in placed:
        begin = 0
        for name in row.sources:
            if name not in shapes:  # export's own, such as places of vectors of modulation
                continue
            homes[name] = (row, begin)
            begin += shapes[name][0] if shapes[name] else 0
    vectors: dict[str, np.ndarray] = {}

    def index(places: Tensor | None) -> Any:
        """null, [first, end], or the name of a vector that is written once."""
        if places is None:
            return None
        array = places.numpy().astype(np.int32)
        if np.array_equal(array, np.arange(len(array)) + (array[0] if len(array) else 0)):
            first = int(array[0]) if len(array) else 0
            return [first, first + len(array)]
        name = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        vectors[name] = array
        return name

    def record(part: Part) -> list[Any]:
        """A part in the bundle's terms."""
        assert part.tensor is not None
        row, first = homes[part.tensor]
        places = [index(part.rows), index(part.columns)]
        if part.kind == "routed":
            up = part.tensor.endswith(".w1")
            begin, end, _ = (part.region[-1] if up else slice(None)).indices(row.shape[-1])
            return [row.name, "up" if up else "down", *places, begin, end]
        own = shapes[part.tensor][0]
        begin, end, _ = (part.region[0] if part.region else slice(None)).indices(own)
        form = "transposed" if row.transposed else "plain"
        return [row.name, form, *places, first + begin, first + end]

    linears = dense_linears(config, family)
    parts, nowhere = {}, []
    for name in linears:
        rows = parts_of(name, config, shards, family)
        if any(part.tensor is None for part in rows):
            nowhere.append(name)
        else:
            parts[name] = [record(part) for part in rows]
    named = {name: list(shape) for name, shape in linears.items()}
    write_json(folder / MAP, {"linears": named, "parts": parts, "nowhere": nowhere})
    order = sorted(vectors)
    header = [(name, "I32", vectors[name].shape) for name in order]
    data = (vectors[name].data.cast("B") for name in order)
    write_chunks(folder / INDICES, file_chunks(header, data))
    return {"map": MAP, "indices": INDICES}
