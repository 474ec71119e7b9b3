"""A bundle of many blocks, made from a small one: its blocks repeated, each with its own weights.

Nothing is exported, so that a model of hundreds of megabytes takes a second. Its transformer.onnx
stays that of the small one, so it is run by blocks.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from runtime.files.tensors import SafeTensors


def long_bundle(small: Path, out: Path, times: int, dtype: str | None = None) -> Path:
    """Copy the bundle `small`, every block of several calls `times` as often, all of them run.

    Copies are written as they are stored, or as `dtype` "F32"; they differ by a factor near 1. No
    groups of blocks are left: they name places in the program.
    """
    shutil.copytree(small, out)
    manifest = json.loads((out / "manifest.json").read_text())
    row = manifest["components"]["transformer"]
    for group in row.pop("groups", {}).values():
        row["types"].pop(group["type"], None)
    manifest.pop("kappa", None)
    tensors = SafeTensors(small / row["weights"])
    program, written = [], {}
    calls = row["program"]
    for kind in dict.fromkeys(call["type"] for call in calls):
        mine = [call for call in calls if call["type"] == kind]
        for copy in range(times if len(mine) > 1 else 1):
            for call in mine:
                prefix = f"{call['prefix']}{copy}." if copy else call["prefix"]
                program.append({"type": kind, "prefix": prefix})
                for local in row["types"][kind]["weights"]:
                    values = tensors.array(call["prefix"] + local)
                    values = values * np.float32(1 - copy / 4096)
                    written[prefix + local] = values.astype(np.float32)
    row["program"] = program
    stored = {tensor.dtype for tensor in tensors.tensors.values()}
    write(out / row["weights"], written, dtype or (stored.pop() if len(stored) == 1 else "F32"))
    manifest["files"][row["weights"]] = {
        "sha256": hashlib.sha256((out / row["weights"]).read_bytes()).hexdigest(),
        "size": (out / row["weights"]).stat().st_size,
    }
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def write(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """A safetensors file of float32 arrays, stored as F32 or BF16."""
    from runtime.files.tensors import narrow

    header, position = {}, 0
    arrays = {name: narrow(a) if dtype == "BF16" else a for name, a in tensors.items()}
    for name, array in arrays.items():
        end = position + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(array.tobytes())
