"""Tensors read from safetensors files into memory that is there already, piece by piece.

What a mapping shows counts as the process's own memory for as long as the mapping lasts; what is
read this way takes no more than the place it is put.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from runtime.files.tensors import DTYPE_NAMES, RAW_DTYPES, SafeTensors, broken, narrow, numpy_dtype

PIECE = 1 << 20  # elements that are converted at a time


class TensorFiles:
    """The files of a SafeTensors, as it opened them; `tensors` is its checked header."""

    def __init__(self, opened: SafeTensors) -> None:
        self.tensors, self.path = opened.tensors, opened.path
        self._files = {name: file for file, header in opened.opened for name in header}

    def read(self, name: str, dtype: str, out: np.ndarray) -> None:
        """Fill `out`, uint8 of the tensor's bytes as `dtype`, with the tensor's values.

        As SafeTensors.array: bfloat16 is its bits. ValueError where the file has become shorter.
        """
        tensor, file = self.tensors[name], self._files[name]
        source = np.dtype(RAW_DTYPES[tensor.dtype])
        target = np.dtype(numpy_dtype(dtype)).newbyteorder("<")
        assert out.nbytes == tensor.size * target.itemsize, name
        if DTYPE_NAMES.get(dtype) == tensor.dtype:
            self.fill(file, tensor.start, out)
            return
        values = out.view(target)
        scratch = np.empty(min(PIECE, tensor.size), source)
        for begin in range(0, tensor.size, PIECE):
            piece = scratch[: min(PIECE, tensor.size - begin)]
            self.fill(file, tensor.start + begin * source.itemsize, piece.view(np.uint8))
            convert(piece, tensor.dtype, dtype, values[begin : begin + len(piece)])

    def fill(self, file: Any, position: int, out: Any) -> None:
        """Bytes of a file from `position` on."""
        view, done = memoryview(out), 0
        while done < len(view):
            if hasattr(os, "preadv"):
                count = os.preadv(file.fileno(), [view[done:]], position + done)
            else:  # Windows; one thread reads
                file.seek(position + done)
                count = file.readinto(view[done:])
            if not count:
                raise broken(self.path, "it shrank while it was being read")
            done += count


def convert(piece: np.ndarray, stored: str, dtype: str, out: np.ndarray) -> None:
    """Raw values of a stored type into `out` of `dtype`: the bits of SafeTensors.array."""
    if stored == "BF16" and dtype == "float32":
        bits = out.view(np.uint32)
        bits[:] = piece
        bits <<= 16
        return
    wide = (piece.astype(np.uint32) << 16).view(np.float32) if stored == "BF16" else piece
    out[:] = narrow(wide.astype(np.float32, copy=False)) if dtype == "bfloat16" else wide
