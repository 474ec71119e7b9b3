"""The routed experts as launches of cubins: worked out as data, then run on a device's stream.

    y[t] = sum over the K largest gates of  gate * (act(x[t] W1[e] + b1[e]) W2[e])

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen. `make_call` needs no device:
grids, arguments and the offset of every scratch tensor for one T. `Cubins` loads the kernels once
and queues a call; nothing waits for the host, so that a call can be recorded in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.bundle.kernel_package import DTYPES, EXTENT, Kernels
from runtime.cuda.arena import SIZES, aligned

MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_SCRATCH = 1 << 40  # bytes


@dataclass(frozen=True)
class KernelLaunch:
    """One kernel: its name in the package, grid, and arguments: a tensor's name, or an integer."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[str | int, ...]


@dataclass(frozen=True)
class Call:
    """The op for one number of tokens. `work`: scratch tensor -> offset in `scratch` bytes."""

    launches: tuple[KernelLaunch, ...]
    work: Mapping[str, int]
    scratch: int


def choose_plan(kernels: Kernels, sm: int, tokens: int, top_k: int) -> dict[str, Any]:
    """The plan for a GPU, T and K; ValueError names what the package has and the cure.

    Code for 8.0 runs on 8.6 and 8.9 too (CUDA's rule within one major number); code for 9.0 and
    later is specific to its own (Triton compiles sm_90a), so there only the same number will do.
    """
    plans = kernels.manifest["plans"]
    fits = [
        plan
        for plan in plans
        if plan["top_k"] == top_k and plan["tokens"][0] <= tokens <= (plan["tokens"][1] or tokens)
    ]
    exact = [plan for plan in fits if plan["sm"] == sm]
    older = [plan for plan in fits if plan["sm"] // 10 == sm // 10 == 8 and plan["sm"] < sm]
    if exact or older:
        return dict(max(exact or older, key=lambda plan: plan["sm"]))
    known = sorted({f"sm_{plan['sm']} with top_k {plan['top_k']}" for plan in plans})
    raise ValueError(
        f"kernels {kernels.path} have no plan for sm_{sm}, top_k {top_k} and {tokens} tokens, only"
        f" for {', '.join(known)}; build them with: python -m d2m.kernels build --sm {sm} --top-k"
        f" {top_k} -o {kernels.path}"
    )


def make_call(plan: Mapping[str, Any], experts: int, tokens: int) -> Call:
    """The launches of a plan for T >= 1 tokens, and where its scratch lies."""
    pairs, rows = tokens * plan["top_k"], plan["block_m"]
    known = {
        "T": tokens,
        "blocks": -(-tokens // plan["block_t"]),
        "tiles": (pairs + min(experts, pairs) * (rows - 1)) // rows,
    }
    work: dict[str, int] = {}
    end = 0
    for name, row in plan["work"].items():
        work[name] = end
        size = math.prod(extent_size(extent, known) for extent in row["shape"])
        end += aligned(size * SIZES[DTYPES[row["dtype"]]])
    if end > MAX_SCRATCH:
        raise ValueError(
            f"the kernels need {end} bytes of scratch, expected at most {MAX_SCRATCH}."
        )
    tensors = {*plan["inputs"], *plan["outputs"], *work}
    launches = []
    for row in plan["launches"]:
        grid = [extent_size(extent, known) for extent in row["grid"]] + [1, 1]
        if any(size > most for size, most in zip(grid, MAX_GRID)):
            raise ValueError(
                f"{tokens} tokens give kernel {row['kernel']} a grid of {grid[:3]}, expected at"
                f" most {list(MAX_GRID)}; generate fewer images at once."
            )
        arguments = tuple(
            value if value in tensors else extent_size(value, known) for value in row["arguments"]
        )
        launches.append(KernelLaunch(row["kernel"], (grid[0], grid[1], grid[2]), arguments))
    return Call(tuple(launches), work, end)


def extent_size(extent: int | str, known: Mapping[str, int]) -> int:
    """A size in numbers: 3072, or "6*tiles" with what `known` counts."""
    if isinstance(extent, int):
        return extent
    match = EXTENT.fullmatch(extent)
    assert match is not None, extent  # the manifest was checked
    return int(match[1] or 1) * known[match[2]]


class Cubins:
    """The kernels of a package on a device (runtime.cuda.device.Device or one with its methods)."""

    def __init__(self, kernels: Kernels, device: Any) -> None:
        self.kernels, self.device = kernels, device
        self._functions: dict[str, Any] = {}
        self._calls: dict[tuple[int, int], Call] = {}

    def prepare(self, tokens: int, top_k: int) -> Call:
        """The call for T and K with its kernels loaded; made once. Says the scratch it needs."""
        key = (tokens, top_k)
        if key not in self._calls:
            plan = choose_plan(self.kernels, self.device.capability, tokens, top_k)
            call = make_call(plan, self.kernels.manifest["experts"], tokens)
            for launch in call.launches:
                if launch.kernel not in self._functions:
                    row = self.kernels.manifest["kernels"][launch.kernel]
                    code = self.kernels.cubin(launch.kernel)
                    function = self.device.load_kernel(code, row["entry"], row["shared"])
                    self._functions[launch.kernel] = function
            self._calls[key] = call
        return self._calls[key]

    def run(self, call: Call, tensors: Mapping[str, int], scratch: int) -> None:
        """Queue a call. `tensors`: addresses of x, logits, w1, b1 (if any), w2, y; `scratch`: of
        call.scratch bytes; all multiples of 16, which the kernels were compiled for."""
        addresses = {**tensors, **{name: scratch + at for name, at in call.work.items()}}
        for launch in call.launches:
            row = self.kernels.manifest["kernels"][launch.kernel]
            values = [
                (addresses[value] if isinstance(value, str) else value, kind)
                for value, (_, kind) in zip(launch.arguments, row["parameters"], strict=True)
            ]
            values += [(0, "*i8")] * row["scratch"]  # Triton's own, not used
            self.device.launch(
                self._functions[launch.kernel], launch.grid, row["block"], row["shared"], values
            )
