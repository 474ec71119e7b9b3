"""Where the weight of a dense Linear lies in a bundle's tensors, and these with adapters added.

A bundle's `lora` file says it (written by export.checkpoint.lora_map), JSON:

    linears   Linear of the dense model -> [O, I]
    indices   a safetensors file of int32 vectors: which dense neuron each row of the bundle is
    parts     Linear -> rows, see Part; together they are the Linear's weight, once
    nowhere   Linears that the model has no place for

Weights are added to as they are bound, in float32, and rounded to the bound dtype once. The file
itself is never written, so an adapter that is taken off leaves nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.files.checked_json import show
from runtime.files.tensors import SafeTensors, Tensor, cast, to_float32
from runtime.lora.changes import Change, Rows

FORMS = ("plain", "transposed", "up", "down")


@dataclass(frozen=True)
class Part:
    """Rows and columns (None: all) of a dense weight, and where they lie in a tensor.

    form   plain       [O', I'] at rows begin to end
           transposed  [I', O'] at columns begin to end
           up          [E, D, H] of [E H, D], at begin to end of the last axis
           down        [E, H, D] of [D, E H], E times as large (for gates of 1/E)
    """

    tensor: str
    form: str
    rows: Rows
    columns: Rows
    begin: int
    end: int

    def add(self, change: Change, onto: np.ndarray) -> None:
        """Add a change of the dense weight to the tensor, float32, in place."""
        where = slice(self.begin, self.end)
        if self.form == "plain":
            onto[where] += change.part(self.rows, self.columns, np.float32)
            return
        if self.form == "down":
            change = change.scaled(len(onto))
        part = change.transposed(self.rows, self.columns, np.float32)
        if self.form == "transposed":
            onto[:, where] += part
        elif self.form == "up":
            experts, width, _ = onto.shape
            onto[:, :, where] += part.reshape(width, experts, -1).transpose(1, 0, 2)
        else:
            onto += part.reshape(onto.shape)


class Placement:
    """A bundle's record, checked: `linears` with their shapes, and the parts of each."""

    def __init__(self, record: Any, indices: SafeTensors, weights: SafeTensors) -> None:
        """`weights`: the bundle's. ValueError, a clause, for a record that does not fit it."""
        fields = ("linears", "parts", "nowhere")
        if not isinstance(record, dict) or not record.keys() >= set(fields):
            raise ValueError(f"it is {show(record)}, expected an object with {', '.join(fields)}")
        self.linears: dict[str, tuple[int, int]] = {}
        for name, shape in dictionary(record["linears"]).items():
            if not isinstance(shape, list) or len(shape) != 2 or not all(map(natural, shape)):
                raise ValueError(f"the shape of {show(name)} is {show(shape)}, expected [O, I]")
            self.linears[name] = (shape[0], shape[1])
        self.nowhere = frozenset(map(str, record["nowhere"]))
        self.parts: dict[str, list[Part]] = {}
        known: dict[str, np.ndarray] = {}
        for name, rows in dictionary(record["parts"]).items():
            if name not in self.linears or not isinstance(rows, list):
                raise ValueError(f"its parts of {show(name)} are not of one of its linears")
            shape = list(self.linears[name])
            self.parts[name] = [read_part(row, shape, indices, known, weights) for row in rows]

    def tensors_of(self, changes: Mapping[str, Change]) -> dict[str, list[tuple[Part, Change]]]:
        """By tensor, what is added to it; ValueError where there is no place for a change."""
        lost = sorted(self.nowhere.intersection(changes))
        if lost:
            raise ValueError(
                f"changes {len(lost)} layers that the model has no place for, since its blocks"
                f" share their modulation or were dropped (the first is {lost[0]}); expected none:"
                " fuse it with d2m lora --lossy and export that, or fuse it before converting."
            )
        found: dict[str, list[tuple[Part, Change]]] = defaultdict(list)
        for name, change in changes.items():
            for part in self.parts[name]:
                found[part.tensor].append((part, change))
        return found


class Adapters:
    """Changes with their strengths, by tensor of the bundle."""

    def __init__(
        self, placement: Placement, several: Iterable[tuple[Mapping[str, Change], float]]
    ) -> None:
        self.by_tensor: dict[str, list[tuple[Part, Change]]] = defaultdict(list)
        for changes, strength in several:
            for tensor, rows in placement.tensors_of(changes).items():
                if strength:
                    self.by_tensor[tensor] += [(part, c.scaled(strength)) for part, c in rows]

    def add(self, tensor: str, weights: np.ndarray) -> np.ndarray:
        """The tensor's weights, float32, with everything added in place."""
        for part, change in self.by_tensor[tensor]:
            part.add(change, weights)
        # A sum in float64 cannot overflow, and takes no memory as a mask would.
        if not np.isfinite(weights.sum(dtype=np.float64)):
            raise ValueError(
                f"{tensor} is NaN or infinite with the LoRAs, expected finite numbers; use smaller"
                " strengths."
            )
        return weights


class Adapted:
    """A SafeTensors with adapters added; tensors that none changes stay mapped as they are."""

    def __init__(self, tensors: SafeTensors, adapters: Adapters | None = None) -> None:
        self.base, self.adapters = tensors, adapters

    @property
    def changed(self) -> frozenset[str]:
        """The tensors that adapters change."""
        return frozenset(self.adapters.by_tensor if self.adapters else ())

    def array(self, name: str, dtype: str) -> np.ndarray:
        """See SafeTensors."""
        array = self.base.array(name, dtype)
        if self.adapters is None or name not in self.adapters.by_tensor:
            return array
        wide = np.array(self.base.array(name, "float32"))
        return cast(self.adapters.add(name, wide), dtype)

    def find(self, name: str) -> Tensor:
        """See SafeTensors."""
        return self.base.find(name)

    def size_as(self, name: str, dtype: str) -> int:
        """See SafeTensors."""
        return self.base.size_as(name, dtype)

    def change(self, name: str, dtype: str, shape: Any, memory: np.ndarray) -> None:
        """Add what adapters add to a tensor that was read into `memory` (uint8) as `dtype`."""
        if self.adapters is None or name not in self.adapters.by_tensor:
            return
        kind = np.dtype("<u2") if dtype == "bfloat16" else np.dtype(dtype)
        there = memory.view(kind).reshape(shape)
        there[...] = cast(self.adapters.add(name, np.array(to_float32(there))), dtype)


def read_part(
    row: Any,
    shape: list[int],
    indices: SafeTensors,
    known: dict[str, np.ndarray],
    weights: SafeTensors,
) -> Part:
    """[tensor, form, rows, columns, begin, end] -> Part; `shape`: of the dense weight."""
    if not isinstance(row, list) or len(row) != 6 or row[1] not in FORMS:
        raise ValueError(f"a part is {show(row)}, expected tensor, form, rows, columns, begin, end")
    tensor, form, *places = row[:4]
    begin, end = row[4:]

    def place(value: Any, size: int) -> tuple[Rows, int]:
        """null, [first, end] or the name of a vector -> places, and how many."""
        if value is None:
            return None, size
        if isinstance(value, list) and len(value) == 2 and all(map(natural, value)):
            vector = np.arange(*value)
        else:
            if value not in known:
                known[value] = indices.array(str(value), "int32").astype(np.int64)
            vector = known[value]
        if vector.ndim != 1 or (len(vector) and not 0 <= vector.min() <= vector.max() < size):
            raise ValueError(f"a part of {show(tensor)} names places outside 0 to {size - 1}")
        return vector, len(vector)

    rows, height = place(places[0], shape[0])
    columns, width = place(places[1], shape[1])
    have = weights.find(str(tensor)).shape
    number = natural(begin) and natural(end) and begin <= end
    wide = end - begin if number else -1
    fits = {
        "plain": len(have) == 2 and have[1] == width and wide == height and end <= have[0],
        "transposed": len(have) == 2 and have[0] == width and wide == height and end <= have[1],
        "up": len(have) == 3 and have[1] == width and have[0] * wide == height and end <= have[-1],
        "down": len(have) == 3 and have[2] == height and have[0] * have[1] == width,
    }
    if not number or not fits[form]:
        raise ValueError(f"a part of {show(tensor)} does not fit its shape {list(have)}")
    return Part(str(tensor), form, rows, columns, begin, end)


def dictionary(value: Any) -> dict[str, Any]:
    """`value` where it is a JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"it holds {show(value)}, expected an object")
    return value


def natural(value: Any) -> bool:
    """Whether `value` is a whole number from 0."""
    return type(value) is int and value >= 0
