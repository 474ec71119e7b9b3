"""PTX of a kernel with another order of parameters: the form a TensorRT plugin launches.

TensorRT passes a plugin's kernel its input tensors, then the extra integers, then its output
tensors, and nothing else (read: tensorrt.plugin.aot_impl). Triton declares parameters as the
kernel's source has them and adds pointers to scratch that our kernels do not use. PTX refers to
parameters by name, so to put the declarations in order, and to leave out unused ones, is enough:
no instruction changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

VERSION = 87  # PTX 8.7: CUDA 12.8 drivers and later take it


def parameters(ptx: str, entry: str) -> list[tuple[str, str]]:
    """(declaration, name) of every parameter of the entry, in order."""
    head = _signature(ptx, entry)[1]
    rows = [row.strip() for row in head.split(",") if row.strip()]
    return [(row, row.split()[-1]) for row in rows]


def reorder(ptx: str, entry: str, order: Sequence[int]) -> str:
    """The PTX with parameters `order` (numbers of the old ones); those left out must be unused.

    Directives that name source files (.file, .loc) are dropped: they say where it was compiled.
    """
    before, _, after = _signature(ptx, entry)
    rows = parameters(ptx, entry)
    left_out = [name for i, (_, name) in enumerate(rows) if i not in order]
    used = [name for name in left_out if re.search(rf"\b{re.escape(name)}\b", after)]
    if used or len(set(order)) != len(order):
        raise ValueError(
            f"kernel {entry} reads its parameters {', '.join(used) or 'twice'}, expected each that"
            " is passed exactly once and none that is not."
        )
    head = ",\n".join(f"\t{rows[i][0]}" for i in order)
    kept = (line for line in after.splitlines() if not re.match(r"\s*\.(file|loc)\b", line))
    return f"{before}\n{head}\n" + "\n".join(kept) + "\n"


def _signature(ptx: str, entry: str) -> tuple[str, str, str]:
    """Text up to the entry's "(", its parameters, and the text from its ")" on."""
    start = re.search(rf"\.visible\s+\.entry\s+{re.escape(entry)}\s*\(", ptx)
    if start is None:
        raise ValueError(f"the PTX has no entry {entry}, expected .visible .entry {entry}(...).")
    end = ptx.index(")", start.end())
    return ptx[: start.end()], ptx[start.end() : end], ptx[end:]
