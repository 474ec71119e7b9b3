"""Training state on disk: safetensors and JSON, whole or not at all, the last two kept.

    FOLDER/00-0000120/state.safetensors   tensors
                      state.json          what the caller wants to know + SHA-256 of both files

A directory appears under its name by one rename, after its files were synced, so a kill at any
moment leaves the checkpoint before. Damage that comes later is found by the hashes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from d2m.recipe.recipe import Recipe, to_dict
from d2m.shards import library_errors, write_one_by_one
from runtime.files.atomic import replace_dir, temporary_sibling, write_json
from runtime.files.checked_json import read_json
from runtime.files.hashes import sha256

KEPT = 2
_NAME = re.compile(r"\d{2}-\d{7}")


def save(
    folder: Path,
    stage: int,
    step: int,
    tensors: Mapping[str, Tensor] | tuple[Mapping[str, Any], Callable[[str], Tensor]],
    facts: Mapping[str, Any],
) -> Path:
    """Write the state after `step` steps of stage number `stage`, then drop all but the last two.

    Args:
        tensors: contiguous tensors on any device; names may hold slashes. Or (name -> (dtype,
            shape), a function name -> tensor) for those that are made one by one, on the CPU.
        facts: anything JSON can hold.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched then.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{stage:02d}-{step:07d}"
    temporary = temporary_sibling(final)
    try:
        temporary.mkdir()
        state = temporary / "state.safetensors"
        if isinstance(tensors, tuple):
            write_one_by_one(state, *tensors)
        else:
            with library_errors():
                save_file(dict(tensors), state)
        record = {"stage": stage, "step": step, "facts": dict(facts), "tensors": sha256(state)}
        write_json(temporary / "state.json", record | {"sha256": _digest(record)})
        replace_dir(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    for leftover in folder.glob(".*.tmp"):  # of a killed run: this one's are gone by now
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def latest(
    folder: Path, log: Callable[[str], None] = print
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The newest whole checkpoint: ({"stage", "step", "facts"}, tensors on the CPU), or None.

    A damaged one is removed, with a message, and the one before it is taken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path in reversed(_checkpoints(folder)):
        try:
            record = read_json(path / "state.json")
            if record.pop("sha256") != _digest(record):
                raise ValueError("state.json does not match its SHA-256")
            if record.pop("tensors") != sha256(path / "state.safetensors"):
                raise ValueError("state.safetensors does not match its SHA-256")
            return record, load_file(path / "state.safetensors")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            log(f"checkpoint {path} is damaged ({error}); it is removed, the previous one used.")
            shutil.rmtree(path, ignore_errors=True)
    return None


def clear(folder: Path) -> None:
    """Remove every checkpoint of `folder`, for a run that starts from the beginning."""
    for path in [*_checkpoints(folder), *folder.glob(".*.tmp")]:
        shutil.rmtree(path)


def identity(student: nn.Module, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What must be the same for a resume to mean anything, as JSON holds it."""
    shapes = {name: list(parameter.shape) for name, parameter in student.named_parameters()}
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    facts = {"recipe": to_dict(recipe), "seed": seed, "parameters": digest}
    return json.loads(json.dumps(facts))


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path) -> None:
    """Raise ValueError, naming what differs, unless two identities are equal."""
    for name in new:
        if old.get(name) != new[name]:
            raise ValueError(
                f"{workdir} holds a run with {name} {json.dumps(old.get(name))}, not "
                f"{json.dumps(new[name])}; resume with the same one, or start again without resume."
            )


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
