"""Safetensors files: tensors as numpy arrays mapped from disk, headers trusted in nothing; written.

Format (read: the safetensors specification): 8 bytes little-endian header length, a JSON object
{name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the tensors' bytes end to end. numpy
has no bfloat16: such tensors are float32 after a 16-bit shift, or uint16 as they lie on disk.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from runtime.files.checked_json import parse_json, printable, read_json, show
from runtime.files.hashes import Stamp, stamp
from runtime.files.quantised import dequantised

# Name in the file -> numpy type of the raw bytes.
RAW_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8",
    "F8_E4M3": "u1",
}  # fmt: skip
DTYPE_NAMES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64",
    "int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float4_e2m1": "U8",
}  # fmt: skip
PACKED = ("I8", "U8", "F8_E4M3")  # what quantised weights are stored as
MAX_HEADER = 16 << 20  # bytes: some 100,000 tensors; FLUX.1 has 800
MAX_RANK = 8
ALIGNMENT = 64  # bytes, of where data begin: a cache line, and the widest vector of any CPU


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `start` and `end` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read and check the header of a safetensors file; costs no more than the header's bytes.

    Raises FileNotFoundError where there is no such file, and ValueError, one sentence, for
    anything that does not add up: every byte after the header belongs to exactly one tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, expected weights in .safetensors format; copy it there again."
        )
    with open(path, "rb") as file:
        return read_open_header(path, file)


def read_open_header(path: Path, file: IO[bytes]) -> dict[str, Tensor]:
    """`read_header` of a file that is open, at its beginning; `path` is for messages."""
    total = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little") if total >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER, total - 8):
        raise broken(path, f"its header length is {length} bytes in a file of {total}")
    return parse_header(path, file.read(length), total)


def parse_header(path: Path, text: bytes, total: int) -> dict[str, Tensor]:
    """The tensors that a header's text names, in a file of `total` bytes."""
    length = len(text)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise broken(path, f"its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise broken(path, "its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise broken(path, "its __metadata__ is no object of strings")
    tensors = {name: read_tensor(path, name, entry) for name, entry in header.items()}
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            what = "overlaps another" if tensor.start < position else "leaves a hole before it"
            raise broken(path, f"tensor {name[:80]!r} {what}")
        position = tensor.end
    if position != total - 8 - length:
        raise broken(path, f"its tensors end at {position}, its data at {total - 8 - length}")
    shift = 8 + length
    return {
        name: Tensor(tensor.dtype, tensor.shape, tensor.start + shift, tensor.end + shift)
        for name, tensor in tensors.items()
    }


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file of a checkpoint in shards, by its index; ValueError where it is none."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(
            f"{path} is not an index of shards: it has no weight_map of names; copy the"
            " checkpoint again."
        )
    for file in where.values():
        if Path(file).name != file:
            raise ValueError(f"{path} names {file!r:.80}, expected files of its own directory.")
    return where


def weight_files(folder: Path) -> list[Path]:
    """A component's safetensors: those that its index names, or all that are there, in order."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        return [folder / file for file in sorted(set(read_index(indexes[0]).values()))]
    return sorted(folder.glob("*.safetensors"))


def file_chunks(
    rows: Sequence[tuple[str, str, Sequence[int]]],
    data: Iterable[memoryview],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[bytes | memoryview]:
    """A file's bytes in chunks: header, then the tensors, each read when its turn comes.

    rows: (name, dtype as files name it, shape) in the file's order; data: the bytes of each.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    sizes, position = [], 0
    for name, dtype, shape in rows:
        sizes.append(math.prod(shape) * np.dtype(RAW_DTYPES[dtype]).itemsize)
        offsets = [position, position + sizes[-1]]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for (name, *_), size, chunk in zip(rows, sizes, data, strict=True):
        assert chunk.nbytes == size, name
        yield chunk


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape, as runtime.files.parameters counts: a quantised weight's own, no scales."""
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in PACKED or f"{name}_scale" not in tensors:
            continue
        found.pop(f"{name}_scale")
        second = found.pop(f"{name}_scale_2", None)
        if tensor.dtype == "U8":  # [.., N, K / 2], or [.., N, G, block / 2]: two numbers a byte
            lead = len(tensor.shape) - (2 if second else 3)
            columns, *bytes_of_row = tensor.shape[lead:]
            found[name] = (*tensor.shape[:lead], 2 * math.prod(bytes_of_row), columns)
    return found


def read_tensor(path: Path, name: str, entry: Any) -> Tensor:
    """One header entry, its offsets still relative to the data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise broken(path, f"the entry of tensor {name[:80]!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in RAW_DTYPES:
        known = ", ".join(RAW_DTYPES)
        raise broken(path, f"tensor {name[:80]!r} has dtype {show(dtype)}, not one of {known}")
    if not naturals(shape) or len(shape) > MAX_RANK:
        raise broken(path, f"tensor {name[:80]!r} has shape {show(shape)}")
    if not naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken(path, f"tensor {name[:80]!r} has offsets {show(offsets)}")
    size = math.prod(shape) * np.dtype(RAW_DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != size:
        stated = offsets[1] - offsets[0]
        raise broken(path, f"tensor {name[:80]!r} fills {stated} bytes, its shape needs {size}")
    return Tensor(dtype, tuple(shape), offsets[0], offsets[1])


class SafeTensors:
    """Safetensors files mapped read-only; arrays are views of the mapping where that is possible.

    `tensors` is the checked header, of all files together if there are `more` than one. A mapping
    lives as long as an array made from it. Each file is opened once, here: `stamps` (of
    runtime.files.hashes, by path) say which one it must be, ValueError where it was replaced.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *more: str | os.PathLike[str],
        stamps: Mapping[Path, Stamp] | None = None,
    ) -> None:
        self.path = Path(path)
        self.files = (self.path, *map(Path, more))
        self.tensors: dict[str, Tensor] = {}
        self.opened: list[tuple[IO[bytes], dict[str, Tensor]]] = []  # files and their headers
        self.mapped: list[np.ndarray] = []  # their bytes
        self._bytes: dict[str, np.ndarray] = {}  # tensor -> its file
        for path in self.files:
            if not path.is_file():
                read_header(path)  # says what is missing
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the last reference
            if stamps is not None and stamp(file.fileno()) != stamps[path]:
                raise broken(path, "it was replaced after its hash was checked")
            header = read_open_header(path, file)
            if twice := header.keys() & self.tensors.keys():
                raise broken(path, f"tensor {min(twice)[:80]!r} is in two files of the model")
            end = max((tensor.end for tensor in header.values()), default=0)
            mapped = np.memmap(file, np.uint8, "r") if end else np.empty(0, np.uint8)
            if len(mapped) < end:
                raise broken(path, "it shrank while it was being read")
            self.opened.append((file, header))
            self.mapped.append(mapped)
            self.tensors |= header
            self._bytes |= dict.fromkeys(header, mapped)

    def raw(self, name: str) -> np.ndarray:
        """The tensor as it lies on disk, without a copy; bfloat16 as uint16."""
        tensor = self.find(name)
        data = self._bytes[name][tensor.start : tensor.end]
        dtype = np.dtype(RAW_DTYPES[tensor.dtype])
        if tensor.start % dtype.itemsize:  # allowed by the format, though no writer aligns so
            data = data.copy()
        return data.view(dtype).view(np.ndarray).reshape(tensor.shape)

    def array(self, name: str, dtype: str | None = None) -> np.ndarray:
        """The tensor as `dtype` ("float32", "float16", "bfloat16": uint16 bits, ...).

        None keeps the stored dtype, bfloat16 becoming float32. No copy where none is needed. A
        quantised weight asked for as a float is dequantised, [.., K, N] (runtime.files.quantised).
        """
        stored, raw = self.find(name).dtype, self.raw(name)
        if self.quantised(name, dtype):
            scales = [n for n in (f"{name}_scale", f"{name}_scale_2") if n in self.tensors]
            raw, stored = dequantised(raw, stored, [self.array(n) for n in scales]), "F32"
        if dtype is None:
            return widen(raw) if stored == "BF16" else raw
        if DTYPE_NAMES.get(dtype) == stored:
            return raw
        values = widen(raw) if stored == "BF16" else raw
        if dtype == "bfloat16":
            return narrow(values.astype(np.float32, copy=False))
        return values.astype(dtype, copy=False)

    def quantised(self, name: str, dtype: str | None) -> bool:
        """Whether a tensor asked for as `dtype` must be dequantised."""
        whole = self.find(name).dtype in PACKED and f"{name}_scale" in self.tensors
        return whole and dtype in ("float32", "float16", "bfloat16")

    def size_as(self, name: str, dtype: str) -> int:
        """Elements of a tensor asked for as `dtype`; of 4 bits, if asked for so, bytes."""
        tensor = self.find(name)
        return tensor.size * (2 if self.quantised(name, dtype) and tensor.dtype == "U8" else 1)

    def find(self, name: str) -> Tensor:
        """The header entry of a tensor; ValueError naming the file where there is none."""
        if name not in self.tensors:
            raise broken(self.path, f"it has no tensor {name[:80]!r}")
        return self.tensors[name]


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) to float32: exact, the lower half of the mantissa is zero."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits (uint16), to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def numpy_dtype(dtype: str) -> str:
    """How numpy holds a dtype of the manifest; bfloat16 and FP8 as their bits."""
    return {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}.get(dtype, dtype)


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array, bfloat16 being uint16 bits, as `dtype`, C-contiguous; no copy where it is so."""
    if array.dtype == numpy_dtype(dtype):
        return np.ascontiguousarray(array)
    wide = to_float32(array) if array.dtype == np.uint16 else array
    return narrow(wide) if dtype == "bfloat16" else np.ascontiguousarray(wide, dtype)


def to_float32(array: np.ndarray) -> np.ndarray:
    """An executor's output as float32; uint16 is bfloat16's bits."""
    return widen(array) if array.dtype == np.uint16 else array.astype(np.float32, copy=False)


def naturals(value: Any) -> bool:
    """Whether `value` is a list of non-negative integers of at most 63 bits."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 63 for item in value
    )


def broken(path: Path, what: str) -> ValueError:
    """The error for a file whose contents are wrong."""
    what = printable(what)
    return ValueError(f"{path} is not valid safetensors: {what}; fetch or export the file again.")
