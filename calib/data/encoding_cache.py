"""Encodings kept in a directory, so that a picture or a caption is encoded once: `--cache DIR`.

    DIR/latents/ab/abcd....safetensors     one file an encoding, named by the hash of what made it

A file appears under its name by one rename after it was synced: a kill leaves it out or whole.
Nothing is unpickled. A cache may be shared by runs, also at the same time, and removed at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.files.atomic import write_bytes, write_json
from runtime.files.checked_json import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn


def key_of(*parts: str | bytes | int) -> str:
    """SHA-256 of the parts, each with its length before it: no two lists of parts are alike."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def digest_of(module: nn.Module) -> str:
    """SHA-256 of a module's config and of every bit of its weights: a second or two per GB."""
    import torch

    config = getattr(module, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    # Private fields tell where it was loaded from and by which release.
    facts = {name: repr(value) for name, value in config.items() if not name.startswith("_")}
    facts.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def cached(
    folder: Path | None,
    kind: str,
    key: Callable[[], str],
    compute: Callable[[], Mapping[str, Tensor]],
    log: Callable[[str], None] = print,
) -> dict[str, Tensor]:
    """The tensors of a key, computed and written where they are not there yet. On the CPU.

    folder: the cache; None computes always. A damaged file is told, and written anew.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    if folder is None:
        return {name: tensor.cpu() for name, tensor in compute().items()}
    name = key()
    path = folder / kind / name[:2] / f"{name}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            log(f"{path} is damaged ({error}); it is computed again.")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
    write_bytes(path, save(tensors))
    return tensors


def read_lengths(folder: Path | None, digest: str) -> dict[str, int]:
    """Rows of the shards of a source, as far as a run with this cache has counted them."""
    path = folder / "lengths" / f"{digest}.json" if folder else None
    if path is None or not path.is_file():
        return {}
    values: dict[str, int] = read_json(path)
    return values


def write_lengths(folder: Path | None, digest: str, lengths: Mapping[str, int]) -> None:
    """Keep them, so that a resumed run need not count through data that lie far away."""
    if folder is not None:
        write_json(folder / "lengths" / f"{digest}.json", dict(lengths))
