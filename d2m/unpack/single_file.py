"""A single file of a transformer and a base pipeline -> a pipeline directory.

The file's names are the makers' own (BFL's for FLUX.1, Chroma and FLUX.2, Alibaba's for Z-Image,
as ComfyUI has them) or diffusers'. Text encoders, VAE, tokenizers and scheduler are the base's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.families import family_of
from d2m.model.components import empty_model
from d2m.plan.hub import UNPACKED
from d2m.shards import STEM, write_one_by_one
from d2m.unpack.stored import Stored, open_stored, quantised
from runtime.files.atomic import temporary_dir, write_json
from runtime.files.checked_json import read_json
from runtime.lora.original_names import ORIGINALS, SCALE

if TYPE_CHECKING:
    from torch import Tensor

# read: what files hold that no model has any more (Z-Image's unused norm)
IGNORED = ("norm_final.weight",)


@dataclass(frozen=True)
class Part:
    """Rows `start` to `end` of a stored tensor; `swapped`: its halves change places first."""

    name: str
    start: int
    end: int
    swapped: bool


def unpack_single_file(
    file: Path,
    base: Path,
    out: Path,
    base_model: str,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Write the pipeline directory `out` of `base` with the transformer of `file`; returns `out`.

    base_model: how the user named the base. A directory that was made of the same files before is
    taken as it is. Memory: one tensor.
    FileNotFoundError, ImportError, OSError or ValueError in one sentence; nothing is left then.
    """
    family = family_of(base)
    folder = base / "transformer"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file; expected a .safetensors or .gguf checkpoint.")
    identity: Any = {"file": _stat(file), "base": _stat(folder / "config.json")}
    identity["base_model"] = base_model
    if (out / UNPACKED).is_file() and read_json(out / UNPACKED) == identity:
        return out
    if out.exists():
        raise ValueError(f"{out} exists and is not of {file}; remove it, or move it away.")
    import diffusers

    model = empty_model(folder, getattr(diffusers, family.names.dense_class))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with open_stored(file) as tensors, temporary_dir(out) as temporary:
        parts = match(tensors, shapes, file, base)
        if formats := quantised(tensors.values()):
            log(f"{file.name} is quantised ({', '.join(formats)}): its weights become bfloat16")
        for entry in sorted(base.iterdir()):
            if entry.name != "transformer":
                (temporary / entry.name).symlink_to(entry.resolve())
        made = temporary / "transformer"
        made.mkdir()
        shutil.copyfile(folder / "config.json", made / "config.json")
        done = 0

        def read(name: str) -> Tensor:
            nonlocal done
            if progress:
                progress("unpack", done, len(parts))
            done += 1
            return take(tensors, parts[name])

        kinds: Any = {
            name: (tensors[part.name].dtype, shapes[name]) for name, part in parts.items()
        }
        write_one_by_one(made / f"{STEM}.safetensors", kinds, read)
        write_json(temporary / UNPACKED, identity)
        os.rename(temporary, out)
    if progress:
        progress("unpack", len(parts), len(parts))
    return out


def match(
    tensors: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], file: Path, base: Path
) -> dict[str, Part]:
    """Where every tensor of diffusers' model lies in the file; ValueError where one does not."""
    found: dict[str, Part] = {}
    for key, tensor in tensors.items():
        if key in IGNORED and key not in shapes:
            continue
        names, swapped = diffusers_names(key, shapes)
        if not names:
            raise ValueError(
                f"{file} holds the tensor {key}, which the transformer of {base} does not have; "
                "give the pipeline of the same model as --base."
            )
        rows = [shapes[name][0] if shapes[name] else 1 for name in names]
        rest = {shapes[name][1:] for name in names}
        if rest != {tensor.shape[1:]} or sum(rows) != (tensor.shape or (1,))[0]:
            raise ValueError(
                f"{file}: the tensor {key} is {list(tensor.shape)}, but {names[0]} of {base} is "
                f"{list(shapes[names[0]])}; give the pipeline of the same model as --base."
            )
        start = 0
        for name, count in zip(names, rows):
            if name in found:
                raise ValueError(f"{file} holds {name} twice, under two names; expected it once.")
            found[name] = Part(key, start, start + count, swapped)
            start += count
    if missing := [name for name in shapes if name not in found]:
        raise ValueError(
            f"{file} lacks {missing[0]}, which the transformer of {base} has ({len(missing)} "
            "missing); give the pipeline of the same model as --base, and a file of all of it."
        )
    return found


def diffusers_names(key: str, shapes: Mapping[str, Any]) -> tuple[list[str], bool]:
    """(diffusers' names of a stored tensor, whether its halves are swapped); [] for none."""
    layer, _, ending = key.rpartition(".")
    ending = SCALE[1] if ending == SCALE[0] else ending
    for original in ORIGINALS:
        layers, swapped = original.find(layer)
        names = [f"{each}.{ending}" for each in layers]
        if names and shapes.keys() >= set(names):
            return names, swapped
    return ([key], False) if key in shapes else ([], False)


def take(tensors: Mapping[str, Stored], part: Part) -> Tensor:
    """A tensor of diffusers' model, from where it lies."""
    import torch

    tensor = tensors[part.name].read()
    if part.swapped:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    return tensor if tensor.ndim == 0 else tensor[part.start : part.end]


def _stat(path: Path) -> list[Any]:
    """What tells a file from another of its name."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
