"""A bundle's safetensors: a checkpoint's tensors re-laid as the block graphs take them.

Linear weights are transposed to [in, out] and q, k, v concatenated; one tensor is in memory at a
time, read from its file and not mapped: pages of a mapping would stay resident, up to the whole
checkpoint. Order and bytes depend on the input alone. Data starts on a 64-byte boundary and
tensors of a multiple of 64 bytes come first, so that nearly all can be used where they are mapped.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.model.components import FLOATS
from export.quant.weights import pack
from runtime.files.atomic import write_chunks
from runtime.files.tensors import ALIGNMENT, DTYPE_NAMES, file_chunks, read_header, weight_files
from runtime.files.tensors import Tensor as Place

if TYPE_CHECKING:
    import torch

    from export.graph.program import Part, Program

Progress = Callable[[str, int, int], None]
# Concatenated projection -> the checkpoint's parts, in order.
PARTS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_kv": ("to_k", "to_v"),
}
NOT_WEIGHTS = (".neurons",)  # buffers of a sparse checkpoint that no graph reads


@dataclass(frozen=True)
class Placed:
    """One tensor of the bundle: its name, what it is made of, its shape and stored dtype.

    `part`: which part of a quantised weight it is, if it is one.
    """

    name: str
    sources: tuple[str, ...]
    transposed: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Part | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a diffusers component directory, whole or in shards, read on demand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        files = weight_files(directory)
        if not files or not all(path.is_file() for path in files):
            raise FileNotFoundError(
                f"{directory} lacks .safetensors files, expected the weights of a diffusers model;"
                " save it with save_pretrained (pickled .bin weights are not read)."
            )
        self._where: dict[str, tuple[str, Place]] = {}
        for path in files:
            try:
                header = read_header(path)
            except OSError as error:
                raise ValueError(f"{path} cannot be read ({error}); restore the file.") from None
            self._where |= {key: (path.name, place) for key, place in header.items()}

    def names(self) -> list[str]:
        """All tensors."""
        return sorted(self._where)

    def files(self) -> dict[str, list[str]]:
        """File name -> the tensors in it."""
        inside: dict[str, list[str]] = {}
        for name, (file, _) in sorted(self._where.items(), key=lambda item: item[1][0]):
            inside.setdefault(file, []).append(name)
        return inside

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, without reading it."""
        return {name: place.shape for name, (_, place) in self._where.items()}

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's stored dtype, without reading it."""
        import torch

        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        found = self.find(name)[1].dtype
        if found not in kinds:
            raise ValueError(
                f"{self.directory} stores the tensor {name} as {found}, expected one of"
                f" {', '.join(kinds)}; save the model in one of these."
            )
        return kinds[found]

    def main_dtype(self) -> torch.dtype:
        """What most numbers are stored in, buffers of integers left out."""
        sizes: Counter[torch.dtype] = Counter()
        for name, (_, place) in self._where.items():
            if place.dtype in FLOATS:
                sizes[self.dtype(name)] += place.size
        return max(sizes, key=lambda kind: (sizes[kind], str(kind)))

    def get(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU; ValueError where the checkpoint lacks it."""
        import torch

        file, place = self.find(name)
        data = torch.empty(place.end - place.start, dtype=torch.uint8)
        with open(self.directory / file, "rb", buffering=0) as stream:
            stream.seek(place.start)
            view, filled = memoryview(data.numpy()), 0
            while filled < len(view) and (read := stream.readinto(view[filled:])):
                filled += read  # Linux reads 2 GiB at a time at most
        if filled < len(view):
            raise ValueError(f"{self.directory / file} shrank while it was read; restore the file.")
        return data.view(self.dtype(name)).reshape(place.shape)

    def find(self, name: str) -> tuple[str, Place]:
        """The file that holds a tensor, and where in it."""
        if name not in self._where:
            raise ValueError(
                f"{self.directory} lacks the tensor {name}, expected the weights of the class that"
                " its config.json names; convert or save the model again."
            )
        return self._where[name]


def place(program: Program, dtype_of: Callable[[str], torch.dtype]) -> list[Placed]:
    """What to write for a component; `dtype_of` says how a checkpoint's tensor is to be stored.

    Routers stay in float32 whatever it says: bfloat16 gates choose other experts.
    """
    import torch

    from export.graph.trace import stays_float32

    placed = []
    for kind, prefix in program.weighted:
        row = program.types[kind]
        for local, spec in row.weights.items():
            part = row.parts.get(local)
            weight = part.weight if part else local
            name = prefix + weight
            linear = f"{weight.rpartition('.')[0]}.weight" in row.linears  # a VAE's to_qkv is none
            sources = sources_of(name) if linear else (name,)
            stored = torch.float32 if stays_float32(name) else dtype_of(sources[0])
            stored = part.stored if part else stored
            shape = tuple(int(side) for side in spec.shape)
            transposed = weight in row.linears
            placed.append(Placed(prefix + local, sources, transposed, shape, stored, part))
    assert len({row.name for row in placed}) == len(placed), "two blocks share a weight"
    return sorted(placed, key=order)


def order(row: Placed) -> tuple[Any, ...]:
    """Well aligned sizes first, then the names with numbers in numerical order."""
    alignment = min(row.size & -row.size, ALIGNMENT) if row.size else ALIGNMENT
    parts = re.split(r"(\d+)", row.name)
    return -alignment, [(int(p), "") if p.isdigit() else (-1, p) for p in parts]


def sources_of(name: str) -> tuple[str, ...]:
    """The checkpoint's names behind a bundle tensor: three for a concatenated projection."""
    for whole, parts in PARTS.items():
        stem, found, kind = name.rpartition(f".{whole}.")
        if found:
            return tuple(f"{stem}.{part}.{kind}" for part in parts)
    return (name,)


def build(row: Placed, get: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The tensor itself, contiguous; ValueError where the checkpoint's shape does not fit.

    Of a quantised weight: the weight, in the checkpoint's type.
    """
    import torch

    parts = [get(source) for source in row.sources]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    if row.transposed:
        tensor = tensor.t()
    shape = row.part.shape if row.part else row.shape
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"the tensor {row.sources[0]} gives {list(tensor.shape)} as {row.name}, expected"
            f" {list(shape)}; weights and config.json are of different models."
        )
    return tensor.detach() if row.part else tensor.detach().to(row.dtype).contiguous()


def write(
    path: Path,
    placed: Iterable[Placed],
    get: Callable[[str], torch.Tensor],
    progress: Progress | None = None,
) -> str:
    """Write the tensors in the order of `placed`; the file is synced. Returns its SHA-256, hex."""
    import torch

    placed, digest = list(placed), hashlib.sha256()
    last: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}  # a weight's parts, mostly neighbours

    def tensor(row: Placed) -> torch.Tensor:
        if row.part is None:
            return build(row, get)
        if row.sources not in last:
            last.clear()
            last[row.sources] = pack(row.part.format, build(row, get))
        return last[row.sources][row.part.suffix].contiguous()

    names = {row.dtype: DTYPE_NAMES[str(row.dtype).removeprefix("torch.")] for row in placed}
    rows = [(row.name, names[row.dtype], row.shape) for row in placed]

    def data() -> Iterator[memoryview]:
        for done, row in enumerate(placed):
            if progress is not None:
                progress(f"write {path.name}", done, len(placed))
            yield tensor(row).reshape(-1).view(torch.uint8).numpy().data

    def hashed() -> Iterator[bytes | memoryview]:
        for piece in file_chunks(rows, data()):
            yield piece
            digest.update(piece)

    write_chunks(path, hashed())
    if progress is not None:
        progress(f"write {path.name}", len(placed), len(placed))
    return digest.hexdigest()


def refuse_unknown(checkpoint: Checkpoint, placed: Iterable[Placed]) -> None:
    """ValueError if the checkpoint holds weights that the bundle would leave out."""
    used = {source for row in placed for source in row.sources}
    unknown = [
        name for name in checkpoint.names() if name not in used and not name.endswith(NOT_WEIGHTS)
    ]
    if unknown:
        raise ValueError(
            f"{checkpoint.directory} holds {len(unknown)} tensors that its class does not use"
            f" ({unknown[0]}, ...), expected none; config.json is of another model."
        )


def parameter_getter(module: Any) -> Callable[[str], torch.Tensor]:
    """`get` for a model in memory."""
    parameters: Mapping[str, torch.Tensor] = dict(module.named_parameters())
    return parameters.__getitem__
