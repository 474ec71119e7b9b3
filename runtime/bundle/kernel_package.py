"""A package of kernels (`python -m d2m.kernels build`), opened with every field checked.

`kernels.json` says what is launched; the cubins beside it are machine code of the GPU. The manifest
is checked as data: names stay inside the directory, sizes are bounded, hashes agree, launches use
only tensors that it declares, inputs and outputs have the shapes of the op. What a cubin does with
them cannot be checked: take packages from where you would take a program.

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.bundle.manifest import check_files
from runtime.bundle.reading import check_file, read_small, wrong_hash
from runtime.files.checked_json import (
    array,
    integer,
    listed,
    mapping,
    one_of,
    parse_json,
    printable,
    show,
    text,
    wrong,
)

FORMATS = (1, 2)  # 2 says what experts do between their matrices, and whether they have biases
ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "swiglu", "geglu")
GATED = ("swiglu", "geglu")  # of these an expert's first matrix has 2 H columns, the gates' first
MANIFEST = "kernels.json"
MAX_MANIFEST = 4 << 20  # bytes
MAX_KERNELS = 1000
MAX_CUBIN = 64 << 20  # bytes
DTYPES = {"fp32": "float32", "i32": "int32", "fp16": "float16", "bf16": "bfloat16"}
COUNTS = ("T", "blocks", "tiles")
EXTENT = re.compile(r"(?:([1-9][0-9]{0,8})\*)?(T|blocks|tiles)")
MAX_SHARED = 228 << 10  # bytes a program, of any GPU so far


@dataclass(frozen=True)
class Kernels:
    """An opened package."""

    path: Path
    manifest: dict[str, Any]

    def cubin(self, name: str) -> bytes:
        """The machine code of one kernel; ValueError where it was replaced."""
        file = self.manifest["kernels"][name]["cubin"]
        data = read_small(self.path, file, MAX_CUBIN)
        found = hashlib.sha256(data).hexdigest()
        if found != self.manifest["files"][file]["sha256"]:
            raise wrong_hash(self.path, file, found)
        return data


def open_kernels(path: str | os.PathLike[str], data: bytes | None = None) -> Kernels:
    """Open and check a directory of kernels; FileNotFoundError or ValueError in one sentence.

    `data` are the bytes of its kernels.json where they were read before.
    """
    root = Path(path)
    source = root / MANIFEST
    if not source.is_file():
        raise FileNotFoundError(
            f"{root} has no {MANIFEST}, expected a package of kernels; make one with: python -m"
            f" d2m.kernels build -o {root}"
        )
    try:
        size = source.stat().st_size
        if size > MAX_MANIFEST:
            raise ValueError(f"its {MANIFEST} has {size} bytes, expected at most {MAX_MANIFEST}")
        manifest = parse_json(read_small(root, MANIFEST, MAX_MANIFEST) if data is None else data)
        check(manifest)
    except ValueError as error:
        what = " ".join(printable(str(error)).replace("manifest.json", MANIFEST).split())[:300]
        raise ValueError(f"kernels {root} cannot be used: {what}; build them again.") from None
    for name, row in manifest["files"].items():
        check_file(root, name, row, full=True)
    return Kernels(root, manifest)


def check(manifest: Any) -> None:
    """Raise ValueError (a clause) where a manifest is not one of FORMATS."""
    if not isinstance(manifest, dict):
        raise ValueError(f"manifest.json holds {show(manifest)}, expected an object")
    if one_of(manifest, "format", FORMATS) > 1:
        one_of(manifest, "activation", ACTIVATIONS)
        if not isinstance(manifest.get("bias"), bool):
            raise wrong("bias", manifest.get("bias"), "true or false")
    text(manifest, "triton")
    one_of(manifest, "dtype", ("fp32", "fp16", "bf16"))
    for name in ("width", "experts", "hidden"):
        integer(manifest, name, 1, 1 << 20)
    files = check_files(mapping(manifest, "files"))
    kernels = mapping(manifest, "kernels")
    if len(kernels) > MAX_KERNELS:
        raise wrong("kernels", f"{len(kernels)} entries", f"at most {MAX_KERNELS}")
    for name in kernels:
        check_kernel(mapping(kernels, name, "kernels"), f"kernels.{name}", files)
    for index, plan in enumerate(array(manifest, "plans", 1, 1000, "plans")):
        if not isinstance(plan, dict):
            raise wrong(f"plans[{index}]", plan, "an object")
        check_plan(plan, f"plans[{index}]", manifest)


def check_kernel(row: dict[str, Any], where: str, files: dict[str, Any]) -> None:
    """One kernel: entry, code, launch shape, parameters of the machine code in order."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", text(row, "entry", where)):
        raise wrong(f"{where}.entry", row["entry"], "a function's name")
    cubin = files[listed(row, "cubin", files, where)]["size"]
    if cubin > MAX_CUBIN:
        raise wrong(f"{where}.cubin", f"a file of {cubin} bytes", f"at most {MAX_CUBIN}")
    integer(row, "block", 32, 1024, where)
    integer(row, "shared", 0, MAX_SHARED, where)
    integer(row, "scratch", 0, 8, where)
    parameters = array(row, "parameters", 1, 64, "pairs of name and type", where)
    kinds = {"i32", *(f"*{name}" for name in DTYPES)}
    if not all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(part, str) for part in pair)
        and pair[1] in kinds
        for pair in parameters
    ):
        raise wrong(f"{where}.parameters", parameters, "a list of name and type")


def check_plan(plan: dict[str, Any], where: str, manifest: dict[str, Any]) -> None:
    """One architecture, stream and top_k: tensors, and launches that use only these."""
    integer(plan, "sm", 50, 999, where)
    integer(plan, "top_k", 1, manifest["experts"], where)
    for name in ("block_m", "block_t"):
        integer(plan, name, 1, 4096, where)
    tokens = plan.get("tokens")
    if (
        not isinstance(tokens, list)
        or len(tokens) != 2
        or type(tokens[0]) is not int
        or not (tokens[1] is None or type(tokens[1]) is int)
        or not 1 <= tokens[0] <= (tokens[1] or tokens[0])
    ):
        raise wrong(f"{where}.tokens", tokens, "the least number of tokens and the most, or null")
    tensors: dict[str, str] = {}
    for side in ("inputs", "outputs", "work"):
        for name, row in mapping(plan, side, where).items():
            here = f"{where}.{side}.{name}"
            if not isinstance(row, dict) or name in tensors:
                raise wrong(here, row, "a tensor, named once")
            tensors[name] = one_of(row, "dtype", tuple(DTYPES), here)
            check_extents(row, "shape", here)
    for side, expected in op_shapes(manifest).items():
        if plan[side] != expected:
            raise wrong(f"{where}.{side}", plan[side], f"the op's: {expected}")
    for index, launch in enumerate(array(plan, "launches", 1, 32, "launches", where)):
        here = f"{where}.launches[{index}]"
        if not isinstance(launch, dict):
            raise wrong(here, launch, "an object")
        kernel = manifest["kernels"][one_of(launch, "kernel", tuple(manifest["kernels"]), here)]
        check_extents(launch, "grid", here)
        count, what = len(kernel["parameters"]), "values, one for every parameter of its kernel"
        arguments = array(launch, "arguments", count, count, what, here)
        for (name, kind), value in zip(kernel["parameters"], arguments):
            if kind == "i32":
                check_extents({name: [value]}, name, here)
            elif not isinstance(value, str) or tensors.get(value) != kind[1:]:
                raise wrong(f"{here}.{name}", value, f"a tensor of {kind[1:]}")


def op_shapes(manifest: dict[str, Any]) -> dict[str, Any]:
    """Inputs and outputs of `d2m::RoutedExperts` for the manifest's sizes."""
    D, E, H = manifest["width"], manifest["experts"], manifest["hidden"]
    wide = H * (2 if manifest.get("activation") in GATED else 1)

    def tensor(*shape: int | str, dtype: str = manifest["dtype"]) -> dict[str, Any]:
        return {"dtype": dtype, "shape": list(shape)}

    inputs = {
        "x": tensor("T", D),
        "logits": tensor("T", E, dtype="fp32"),
        "w1": tensor(E, D, wide),
        "b1": tensor(E, wide),
        "w2": tensor(E, H, D),
    }
    if not manifest.get("bias", True):
        del inputs["b1"]
    return {"inputs": inputs, "outputs": {"y": tensor("T", D)}}


def check_extents(row: dict[str, Any], key: str, where: str) -> None:
    """A list of 1 to 3 sizes: numbers, or "f*name" over COUNTS."""
    for size in (sizes := array(row, key, 1, 3, "sizes", where)):
        number = type(size) is int and 1 <= size < 1 << 31
        if not number and not (isinstance(size, str) and EXTENT.fullmatch(size)):
            raise wrong(
                f"{where}.{key}", sizes, f"numbers, or multiples of one of {', '.join(COUNTS)}"
            )
