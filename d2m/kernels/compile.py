"""Kernels compiled ahead of time, without a GPU, and what their machine code looks like.

The same plans as the launcher's are read, so what is packaged or inspected is what would run.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from d2m.kernels.plan import KERNELS, Launch, Plan

# One line of nvdisasm: perhaps its address, perhaps a predicate, then the instruction's name.
INSTRUCTION = re.compile(
    r"^\s+(?:/\*[0-9a-f]+\*/)?\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", re.M
)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture: code in two forms, and how it has to be launched.

    `parameters` are those of the machine code, in order, as (name, type): pointers "*bf16" or
    integers "i32". Triton adds two pointers at the end (`scratch`, to be passed as null).
    """

    entry: str
    sm: int
    cubin: bytes
    ptx: str
    warps: int
    shared: int
    parameters: tuple[tuple[str, str], ...]
    scratch: int


def signature(plan: Plan, launch: Launch, names: list[str]) -> dict[str, str]:
    """Triton's type of every parameter of the launch's kernel, in the kernel's order."""
    arguments, constants = dict(launch.arguments), dict(launch.constants)
    types = {}
    for name in names:
        if name in constants:
            types[name] = "constexpr"
            continue
        value = arguments[name]
        types[name] = f"*{plan.dtype(value)}" if isinstance(value, str) else "i32"
    return types


@lru_cache(maxsize=512)
def _compiled(
    kernel: str,
    types: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    sm: int,
    warps: int,
    stages: int,
    ptx_version: int | None,
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, attribute = KERNELS[kernel].partition(":")
    function = getattr(importlib.import_module(module), attribute)
    if not isinstance(function, triton.JITFunction):
        raise RuntimeError(
            "kernels cannot be compiled while TRITON_INTERPRET is set: unset it and start again."
        )
    order = [name for name, _ in types]
    # Every tensor starts at a multiple of 16 bytes: torch and cudaMalloc give 256.
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, (_, kind) in enumerate(types) if kind[0] == "*"
    }
    source = ASTSource(
        function, dict(types), {(order.index(name),): value for name, value in constants}, aligned
    )
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if ptx_version is not None:
        options["ptx_version"] = ptx_version
    done = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    metadata, ptx = done.metadata, done.asm["ptx"]
    kept = tuple((name, kind) for name, kind in types if kind != "constexpr")
    entry = metadata.name
    declared = ptx[ptx.index(f".entry {entry}") :].split(")", 1)[0].count(".param")
    return Compiled(
        entry,
        sm,
        done.asm["cubin"],
        ptx,
        metadata.num_warps,
        metadata.shared,
        kept,
        declared - len(kept),
    )


def compile_launch(plan: Plan, launch: Launch, sm: int, ptx_version: int | None = None) -> Compiled:
    """Compile one launch of a plan for sm_80, 86, 89, 90, 100 or 120; takes 0.2 to 3 s.

    ptx_version 87 asks for PTX 8.7, which CUDA 12.8 drivers take; None is Triton's own choice.
    """
    module, _, attribute = KERNELS[launch.kernel].partition(":")
    names = getattr(importlib.import_module(module), attribute).arg_names
    types = tuple(signature(plan, launch, names).items())
    return _compiled(
        launch.kernel, types, launch.constants, sm, launch.warps, launch.stages, ptx_version
    )


def tool(name: str) -> Path:
    """`cuobjdump` or `nvdisasm` out of Triton's wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not in this triton; expected {path}.")
    return path


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(SASS, resource usage) of a cubin as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for command in (
                [str(tool("nvdisasm")), "-c", file.name],
                [str(tool("cuobjdump")), "--dump-resource-usage", file.name],
            )
        )
    return sass, usage


def inspect(compiled: Compiled) -> dict[str, Any]:
    """What the machine code of one kernel holds: registers, memory, and counts of instructions.

    registers a thread, `local` and `stack` bytes a thread (spills), shared bytes a program,
    `spills` (STL and LDL), `wide` (16-byte loads from global memory, asynchronous copies included),
    `narrow` (shorter ones by name), `stores` and `mma` (matrix instructions) by name.
    """
    sass, usage = disassemble(compiled.cubin)
    ops: Counter[str] = Counter(INSTRUCTION.findall(sass))
    loads = {op: n for op, n in ops.items() if op.startswith(("LDG.", "LDGSTS."))}
    matrix = ("HMMA", "HGMMA", "UTCHMMA", "UTCOMMA", "QGMMA", "DMMA")
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    return {
        "entry": compiled.entry,
        "sm": compiled.sm,
        "warps": compiled.warps,
        "shared": compiled.shared,
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "local": int(found["LOCAL"]),
        "spills": sum(n for op, n in ops.items() if op.startswith(("STL", "LDL"))),
        "wide": sum(n for op, n in loads.items() if ".128" in op),
        "narrow": {op: n for op, n in loads.items() if ".128" not in op},
        "stores": {op: n for op, n in ops.items() if op.startswith("STG")},
        "mma": {op: n for op, n in ops.items() if op.startswith(matrix)},
        "instructions": sum(ops.values()),
    }
