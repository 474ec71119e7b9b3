"""The forward kernels as files: cubins, PTX and one manifest, usable without torch or triton.

`DIR/kernels.json` and `DIR/sm90/*.cubin`, `DIR/sm90/*.ptx`. The manifest holds what a launcher
needs and no formula that it has to know: for every architecture, stream and number of experts the
launches in order, with grids, scratch shapes and integer arguments as texts over the counts of
`extents.counts`. Without source lines in the code (TRITON_DISABLE_LINE_INFO) the same triton gives
the same bytes; no date and no path is written.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2m import __version__
from d2m.families.site import ACTIVATIONS
from d2m.kernels.compile import Compiled, compile_launch
from d2m.kernels.configs import BYTES, IMAGE_TOKENS, shared_limit, tiles_for
from d2m.kernels.extents import Extent, counts, fit
from d2m.kernels.plan import Launch, Plan, Sizes, forward_plan
from d2m.kernels.ptx import VERSION, reorder
from runtime.files.atomic import replace_dir, temporary_dir, write_json

FORMAT = 1  # 2 where experts are of another kind than tanh GELU with biases, which it says
MANIFEST = "kernels.json"
SM = (80, 86, 89, 90, 100, 120)
# Numbers of tokens whose plans the texts are fitted to; the last is fewer than there are experts.
SAMPLES = {"image": (4608, 2048, 36864, 5003), "text": (512, 2047, 77, 1)}
Compile = Callable[[Plan, Launch, int, int | None], Compiled]


def build(
    out: str | Path,
    sizes: Sizes,
    sm: Sequence[int],
    top_k: Sequence[int],
    *,
    streams: Sequence[str] = ("image", "text"),
    compile: Compile = compile_launch,
    ptx: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Compile the forward for every `sm`, stream and `top_k`; write `out`; return the manifest.

    sizes: width D, experts E, hidden H, dtype and kind; its tokens and top_k are not read. Without
    `ptx` there are cubins alone (a TensorRT plugin needs PTX, runtime.bundle.kernel_package does
    not). The directory appears whole or not at all. Raises ValueError in one sentence for what
    cannot be compiled.
    """
    check(sizes, sm, top_k, streams)
    out = Path(out)
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ValueError(
            f"{out} exists and holds no {MANIFEST}, expected a new name or a directory of kernels"
            " to replace; choose another output directory."
        )
    cases = [(s, stream, k) for s in sorted(set(sm)) for stream in streams for k in top_k]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "d2m": __version__,
        "triton": triton_version(),
        "ptx": VERSION,
        "width": sizes.width,
        "experts": sizes.experts,
        "hidden": sizes.hidden,
        "dtype": sizes.dtype,
        **kind_of(sizes),
        "files": {},
        "kernels": {},
        "plans": [],
    }
    # `up` and `down` are the same code for every top_k: several plans name one file.
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_dir(out) as folder:
        for done, (arch, stream, k) in enumerate(cases):
            if progress is not None:
                progress(f"sm_{arch} {stream} k={k}", done, len(cases))
            plan = plan_record(replace(sizes, top_k=k), arch, stream, compile)
            for kernel in plan.pop("compiled"):
                add_kernel(folder, manifest, kernel, ptx)
            manifest["plans"].append(plan)
        write_json(folder / MANIFEST, manifest)
        replace_dir(folder, out)
    if progress is not None:
        progress("kernels", len(cases), len(cases))
    return manifest


def kind_of(sizes: Sizes) -> dict[str, Any]:
    """What a manifest says of other experts than those with tanh GELU and biases."""
    if (sizes.activation, sizes.bias) == ("gelu_tanh", True):
        return {}
    return {"format": FORMAT + 1, "activation": sizes.activation, "bias": sizes.bias}


def check(sizes: Sizes, sm: Sequence[int], top_k: Sequence[int], streams: Sequence[str]) -> None:
    """Refuse what cannot be built before triton is imported."""
    unknown = [str(arch) for arch in sm if arch not in SM]
    if unknown or not sm:
        raise ValueError(
            f"--sm is {','.join(unknown) or 'empty'}, expected some of {', '.join(map(str, SM))}."
        )
    if sizes.dtype not in BYTES:
        raise ValueError(f"--dtype is {sizes.dtype!r}, expected one of {', '.join(BYTES)}.")
    for name in ("width", "experts", "hidden"):
        value = getattr(sizes, name)
        if not 1 <= value <= 1 << 20:
            raise ValueError(f"--{name} is {value}, expected 1 to {1 << 20}.")
    if sizes.activation not in ACTIVATIONS:
        raise ValueError(
            f"--activation is {sizes.activation!r}, expected one of {', '.join(ACTIVATIONS)}."
        )
    if not top_k or any(not 1 <= k <= sizes.experts for k in top_k):
        raise ValueError(
            f"--top-k is {','.join(map(str, top_k)) or 'empty'}, expected numbers from 1 to"
            f" {sizes.experts}, the experts; with 0 there is nothing to launch."
        )
    if not streams or any(stream not in SAMPLES for stream in streams):
        raise ValueError(f"the streams are {list(streams)}, expected some of {list(SAMPLES)}.")


@contextmanager
def plain_code() -> Iterator[None]:
    """Compile without line information, which would hold paths of this machine.

    In a cache of its own: one filled with line information would be read back.
    """
    names = ("TRITON_DISABLE_LINE_INFO", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="d2m-triton-") as cache:
        os.environ |= dict(zip(names, ("1", cache)))
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def triton_version() -> str:
    """The release that compiles; ImportError names what installs it."""
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError as error:
        raise ImportError(
            f"compiling kernels needs triton ({error}); install it on Linux with: pip install"
            " triton"
        ) from None


def plan_record(sizes: Sizes, sm: int, stream: str, compile: Compile) -> dict[str, Any]:
    """One architecture, stream and top_k: what is launched, and under "compiled" its kernels."""
    samples = [replace(sizes, tokens=tokens) for tokens in SAMPLES[stream]]
    tiles = tiles_for(sm, sizes.dtype, samples[0].tokens, sizes.width, sizes.hidden, sizes.gated)
    plans = [forward_plan(sample, tiles) for sample in samples]
    known = [counts(sample, tiles) for sample in samples]
    first = plans[0]

    def shapes(side: str) -> dict[str, Any]:
        found = [getattr(plan, side) for plan in plans]
        return {
            name: {
                "dtype": dtype,
                "shape": [fit([f[name][1][i] for f in found], known) for i in range(len(shape))],
            }
            for name, (dtype, shape) in found[0].items()
        }

    launches, compiled = [], []
    for index, launch in enumerate(first.launches):
        same = [plan.launches[index] for plan in plans]
        kernel = compile(first, launch, sm, VERSION)
        refuse(kernel, sm)
        name = kernel_name(kernel, sizes, stream)
        compiled.append((name, kernel, plugin_order(first, launch, kernel)))
        values = [dict(row.arguments) for row in same]
        arguments: list[Extent] = []
        for parameter, _ in kernel.parameters:
            value = values[0][parameter]
            numbers = [row[parameter] for row in values]
            arguments.append(value if isinstance(value, str) else fit(numbers, known))  # type: ignore[arg-type]
        grid = [fit([row.grid[i] for row in same], known) for i in range(len(launch.grid))]
        launches.append({"kernel": name, "grid": grid, "arguments": arguments})
    return {
        "sm": sm,
        "stream": stream,
        "tokens": [IMAGE_TOKENS, None] if stream == "image" else [1, IMAGE_TOKENS - 1],
        "top_k": sizes.top_k,
        "block_m": tiles.m,
        "block_t": tiles.block_t,
        "inputs": shapes("inputs"),
        "outputs": shapes("outputs"),
        "work": shapes("work"),
        "launches": launches,
        "compiled": compiled,
    }


def kernel_name(kernel: Compiled, sizes: Sizes, stream: str) -> str:
    """sm90/up-image: `up` and `down` are the same for every top_k, the others are not."""
    tail = "" if kernel.entry in ("up", "down") else f"-k{sizes.top_k}"
    return f"sm{kernel.sm}/{kernel.entry}-{stream}{tail}"


def plugin_order(plan: Plan, launch: Launch, kernel: Compiled) -> list[int]:
    """Parameters as TensorRT passes them: tensors read, integers, tensors written.

    A tensor is written by the first launch of the plan that has it and is no input.
    """
    arguments = dict(launch.arguments)
    earlier: set[str | int] = set(plan.inputs)
    for other in plan.launches:
        if other is launch:
            break
        earlier.update(value for _, value in other.arguments if isinstance(value, str))
    groups: tuple[list[int], ...] = ([], [], [])
    for i, (name, kind) in enumerate(kernel.parameters):
        group = 1 if not kind.startswith("*") else 0 if arguments[name] in earlier else 2
        groups[group].append(i)
    return [i for group in groups for i in group]


def refuse(kernel: Compiled, sm: int) -> None:
    """Shared memory over the architecture's limit, which Triton does not check: no launch."""
    limit = shared_limit(sm)
    if kernel.shared > limit:
        raise ValueError(
            f"kernel {kernel.entry} for sm_{sm} takes {kernel.shared} bytes of shared memory,"
            f" expected at most {limit}; its tile in d2m/kernels/configs.py is too large."
        )


def add_kernel(
    folder: Path, manifest: dict[str, Any], compiled: tuple[str, Compiled, list[int]], ptx: bool
) -> None:
    """Write one kernel's files and its record; the same name twice must be the same kernel."""
    name, kernel, order = compiled
    record = {
        "entry": kernel.entry,
        "cubin": f"{name}.cubin",
        "block": 32 * kernel.warps,
        "shared": kernel.shared,
        "parameters": [list(pair) for pair in kernel.parameters],
        "scratch": kernel.scratch,
    }
    files = {f"{name}.cubin": kernel.cubin}
    if ptx:
        record |= {"ptx": f"{name}.ptx", "plugin": [kernel.parameters[i][0] for i in order]}
        files[f"{name}.ptx"] = reorder(kernel.ptx, kernel.entry, order).encode()
    known = manifest["kernels"].setdefault(name, record)
    for path, data in files.items():
        row = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        if known != record or manifest["files"].setdefault(path, row) != row:
            raise ValueError(f"two kernels are called {name}, expected one: a name must hold all.")
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)  # synced by replace_dir
