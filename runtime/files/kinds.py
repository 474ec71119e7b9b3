"""What a path that is not what was expected is, and the command that takes it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from runtime.files.checked_json import read_json

PICKLED = (".bin", ".ckpt", ".pt", ".pth")
MAX_HEADER = 64 << 20  # bytes of JSON in a safetensors file that are read to tell a LoRA


def not_a(wanted: str, path: str | os.PathLike[str], otherwise: str) -> str:
    """The sentence for a path that is not `wanted`: what it is, and what to do with it.

    otherwise: what to do where that cannot be told from the path.
    """
    what, cure = kind(Path(path))
    return f"{path} {what}, expected {wanted}; {cure or otherwise}"


def kind(path: Path) -> tuple[str, str]:
    """("is a LoRA", the command for it); "" where there is none. Reads names and headers alone."""
    given = shlex.quote(str(path))
    if (path / "manifest.json").is_file():
        return "is a bundle", f"see d2m inspect {given}, or generate with: d2m run {given} PROMPT"
    if (path / "model_index.json").is_file():
        try:
            transformer = str(read_json(path / "model_index.json").get("transformer"))
        except ValueError:  # who opens it says what is wrong with it
            transformer = ""
        if "Sparse" in transformer:
            return "is a sparse pipeline", f"compile it with: d2m export {given} -o NEW"
        return "is a dense pipeline", f"convert it with: d2m convert {given} -o NEW"
    if path.is_dir():
        if (path.absolute().parent / "model_index.json").is_file():
            return "is a part of a pipeline", f"give the whole one: {path.absolute().parent}"
        return "has no manifest.json and no model_index.json", ""
    if not path.is_file():
        return "is no directory", ""
    with open(path, "rb") as file:
        begin = file.read(8)
        size = int.from_bytes(begin, "little")
        header = file.read(size) if size <= MAX_HEADER else b""
    whole = f"convert it with: d2m convert {given} --base PIPELINE -o NEW"
    if begin[:4] == b"GGUF":
        return "is a GGUF file (quantized weights)", whole
    if begin == b"\x89PNG\r\n\x1a\n":
        return "is a PNG image", f"generate it again with: d2m run --regenerate {given} -o NEW.png"
    if path.suffix == ".safetensors" and (b".lora_" in header or b"lora_A" in header):
        return "is a LoRA", f"fuse it with: d2m lora {given} --onto PIPELINE -o NEW"
    if path.suffix == ".safetensors":
        return "is a single-file checkpoint", whole
    if path.suffix in PICKLED:
        cure = "nothing is unpickled: take the model's .safetensors, or save them from it"
        return "is a pickled checkpoint", cure
    return "is a file", ""
