"""Checkpoints larger than memory: safetensors shards read and written a few tensors at a time.

A tensor that was read is a view of the file; the memory it takes goes when the last of a reading's
tensors does. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.files.atomic import write_chunks, write_json
from runtime.files.tensors import DTYPE_NAMES, file_chunks, read_header, read_index, shapes_of

if TYPE_CHECKING:
    from torch import Size, Tensor, dtype

    Kinds = Mapping[str, tuple[dtype, Size]]

STEM = "diffusion_pytorch_model"  # diffusers' names
INDEX = f"{STEM}.safetensors.index.json"
IMPORTANCE = "importance.safetensors"  # in a sparse pipeline: the scores that split its neurons


@dataclass(frozen=True)
class Shards:
    """The tensors of a checkpoint directory: the file and shape of each. Nothing is open."""

    folder: Path
    where: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU. KeyError for a name the checkpoint has not."""
        from safetensors import safe_open

        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.where[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, inside in by_file.items():
            with safe_open(self.folder / file, framework="pt") as shard:
                tensors |= {name: shard.get_tensor(name) for name in inside}
        return tensors


def open_shards(folder: str | os.PathLike[str]) -> Shards:
    """The checkpoint in `folder`, as diffusers saves one: an index and shards, or a single file.

    Raises FileNotFoundError or ValueError, in one sentence, where a file is missing, truncated or
    not as the index says.
    """
    folder = Path(folder)
    index, single = folder / INDEX, f"{STEM}.safetensors"
    if index.is_file():
        file_of = read_index(index)
    elif (folder / single).is_file():
        file_of = dict.fromkeys(read_header(folder / single), single)
    else:
        raise FileNotFoundError(
            f"{folder} has neither {INDEX} nor {single}; expected a transformer's weights as "
            "diffusers saves them."
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(file_of.values())):
        inside = shapes_of(read_header(folder / file))
        for name in (name for name, where in file_of.items() if where == file):
            if name not in inside:
                raise ValueError(
                    f"{folder / file} lacks {name}, which {INDEX} says it holds; copy the "
                    "checkpoint again."
                )
            shapes[name] = inside[name]
    return Shards(folder, file_of, shapes)


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file at once; tensors go to disk from where they are, without another copy."""
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_one_by_one(path, kinds, lambda name: tensors[name])


def write_one_by_one(path: Path, kinds: Kinds, tensor: Callable[[str], Tensor]) -> None:
    """The same of tensors that `tensor(name)` makes when their turn comes, as `order` has it.

    kinds: name -> (dtype, shape); they are on the CPU.
    """
    import torch

    names = order(kinds)
    rows = [
        (name, DTYPE_NAMES[str(kinds[name][0]).removeprefix("torch.")], kinds[name][1])
        for name in names
    ]
    flat = (tensor(name).detach().contiguous().reshape(-1) for name in names)
    data = (each.view(torch.uint8).numpy().data for each in flat)
    write_chunks(path, file_chunks(rows, data, {"format": "pt"}))  # which transformers asks for


def order(kinds: Kinds) -> list[str]:
    """Largest elements first: with the header padded, every tensor is aligned to its own."""
    return sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))


def shard_name(number: int, count: int) -> str:
    """diffusers' name of shard `number` (from 1) of `count`."""
    return f"{STEM}-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: Iterable[str]) -> Shards:
    """Write the index of the shards that lie in `folder`; returns what it describes."""
    file_of: dict[str, str] = {}
    size = 0
    for file in files:
        tensors = read_header(folder / file)
        file_of |= dict.fromkeys(tensors, file)
        size += sum(tensor.end - tensor.start for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": file_of})
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
