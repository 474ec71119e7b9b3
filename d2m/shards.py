"""Checkpoints larger than memory: safetensors shards read and written a few tensors at a time.

A tensor that was read is a view of the file; the memory it takes goes when the last of a reading's
tensors does. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.files.atomic import write_json, write_pieces

if TYPE_CHECKING:
    from torch import Size, Tensor, dtype

    Kinds = Mapping[str, tuple[dtype, Size]]

STEM = "diffusion_pytorch_model"  # diffusers' names
INDEX = f"{STEM}.safetensors.index.json"
ALIGNMENT = 64  # of every tensor's first byte, so that it can be mapped as any dtype
HEADER_LIMIT = 100_000_000  # read: what the safetensors library accepts


@dataclass(frozen=True)
class Shards:
    """The tensors of a checkpoint directory: where each is and its shape. Nothing is open."""

    folder: Path
    where: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU. KeyError for a name the checkpoint has not."""
        from safetensors import safe_open

        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.where[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, inside in by_file.items():
            with safe_open(self.folder / file, framework="pt") as shard:
                found |= {name: shard.get_tensor(name) for name in inside}
        return found


def open_shards(folder: str | os.PathLike[str]) -> Shards:
    """The checkpoint in `folder`, as diffusers saves one: an index and shards, or a single file.

    Raises FileNotFoundError or ValueError, in one sentence, where a file is missing, truncated or
    not the one the index speaks of.
    """
    folder = Path(folder)
    index, single = folder / INDEX, f"{STEM}.safetensors"
    if index.is_file():
        try:
            told = {str(k): str(v) for k, v in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is not an index of shards ({type(error).__name__}: {error}); copy the "
                "checkpoint again."
            ) from error
    elif (folder / single).is_file():
        told = dict.fromkeys(header(folder / single), single)
    else:
        raise FileNotFoundError(
            f"{folder} has neither {INDEX} nor {single}; expected a transformer's weights as "
            "diffusers saves them."
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(told.values())):
        if Path(file).name != file:
            raise ValueError(f"{index} names {file!r}; expected files of its own directory.")
        inside = header(folder / file)
        for name in (name for name, where in told.items() if where == file):
            if name not in inside:
                raise ValueError(
                    f"{folder / file} lacks {name}, which {INDEX} says it holds; copy the "
                    "checkpoint again."
                )
            shapes[name] = inside[name]
    return Shards(folder, told, shapes)


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a safetensors file, without its tensors; the file's size is checked.

    FileNotFoundError or ValueError, in one sentence, if it is missing, truncated or no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the checkpoint again.")
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            told = json.loads(file.read(length))
        told.pop("__metadata__", None)
        end = max((int(row["data_offsets"][1]) for row in told.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{8 + length + end} bytes expected, {size} there")
        return {str(name): tuple(int(n) for n in row["shape"]) for name, row in told.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); copy the checkpoint again."
        ) from error


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file at once; tensors go to disk from where they are, without another copy."""
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_one_by_one(path, kinds, lambda name: tensors[name])


def write_one_by_one(path: Path, kinds: Kinds, tensor: Callable[[str], Tensor]) -> None:
    """The same of tensors that `tensor(name)` makes when their turn comes, as `order` has it.

    kinds: name -> (dtype, shape); they are on the CPU.
    """
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
    }
    rows: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}  # transformers asks
    position = 0
    for name in order(kinds):
        dtype, shape = kinds[name]
        end = position + math.prod(shape) * dtype.itemsize
        rows[name] = {
            "dtype": names[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    flat = (tensor(name).detach().contiguous().reshape(-1) for name in order(kinds))
    data = (each.view(torch.uint8).numpy().data for each in flat)
    write_pieces(path, chain([len(text).to_bytes(8, "little") + text], data))


def order(kinds: Kinds) -> list[str]:
    """Largest elements first: with the header padded, every tensor is aligned to its own."""
    return sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))


def shard_name(number: int, count: int) -> str:
    """diffusers' name of shard `number` (from 1) of `count`."""
    return f"{STEM}-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: Iterable[str]) -> Shards:
    """Write the index of the shards that lie in `folder`; returns what it describes."""
    told: dict[str, str] = {}
    size = 0
    for file in files:
        path = folder / file
        told |= dict.fromkeys(header(path), file)
        with open(path, "rb") as stream:
            size += path.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": told})
    return open_shards(folder)


@contextmanager
def library_errors() -> Iterator[None]:
    """Within: a disk that the safetensors library cannot write to is an OSError, as elsewhere."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number)) from error
        raise
