"""Tensors in device memory: what they are called and measure, and where each lies in one arena."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

ALIGN = 256  # bytes; what cudaMalloc guarantees and kernels may assume
SIZES = {
    "float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1,
    "int8": 1, "uint8": 1, "float8_e4m3fn": 1,
    "float4_e2m1": 1,  # two numbers a byte, counted by the byte
}  # fmt: skip


@dataclass(eq=False)
class Buffer:
    """A tensor in device memory; `offset` is its place in the arena, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = -1

    @property
    def size(self) -> int:
        """Bytes it fills."""
        return byte_size(self.shape, self.dtype)


class Step(Protocol):
    """What reads and writes buffers: a launch of a plan, or a copy of rows."""

    @property
    def inputs(self) -> Mapping[str, Buffer]:
        """What must be there before."""

    @property
    def outputs(self) -> Mapping[str, Buffer]:
        """What is written."""


def place_buffers(inputs: list[Buffer], launches: Sequence[Step], outputs: list[Buffer]) -> int:
    """Give every buffer an offset; returns the arena's size.

    Inputs are all written before the first launch, outputs are read after the last; in between a
    buffer lives from the launch that writes it to the last that reads it. First fit, in order.
    Inputs that have an offset (from the section before) keep it.
    """
    last: dict[int, int] = {id(buffer): -1 for buffer in inputs}
    for index, launch in enumerate(launches):
        for buffer in (*launch.inputs.values(), *launch.outputs.values()):
            last[id(buffer)] = index
    for buffer in outputs:
        last[id(buffer)] = len(launches)
    live: list[Buffer] = []
    end = 0

    def place(buffer: Buffer) -> int:
        """Give `buffer` the first hole between the live ones that it fits; where it ends."""
        offset = 0
        for other in sorted(live, key=lambda item: item.offset):
            if offset + buffer.size <= other.offset:
                break
            offset = max(offset, aligned(other.offset + other.size))
        buffer.offset = offset
        live.append(buffer)
        return offset + buffer.size

    for buffer in inputs:
        if buffer.offset < 0:
            end = max(end, place(buffer))
        else:
            live.append(buffer)
            end = max(end, buffer.offset + buffer.size)
    for index, launch in enumerate(launches):
        for buffer in launch.outputs.values():
            end = max(end, place(buffer))
        live = [buffer for buffer in live if last[id(buffer)] > index]
    return aligned(end)


def aligned(size: int) -> int:
    """`size` rounded up to ALIGN."""
    return -(-size // ALIGN) * ALIGN


def byte_size(shape: Iterable[int], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * SIZES[dtype]
