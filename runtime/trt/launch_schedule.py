"""What a program of plans does on a device, worked out without one: pure data, tested on a CPU.

A component's program is run once with descriptions in place of tensors (`run_program`). Out comes
every launch in order, which buffer or weight each of its tensors is bound to, with which shape, and
where each buffer lies in one arena; a buffer's place is used again once its last reader has run.
A program whose groups of blocks are not chosen yet is worked out section by section
(runtime.bundle.block_groups).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.cuda.arena import Buffer, place_buffers
from runtime.program.executor import graph_key, run_program
from runtime.program.residuals import Added
from runtime.trt.launches import BufferRows, Copy, Launch, Section


@dataclass(frozen=True)
class LaunchSchedule:
    """A component's run for one set of sizes; `arena` is the bytes all buffers need together.

    A section of a run has in `env` the program's tensors as it leaves them, and in `logits` what
    the router at its end has written.
    """

    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]
    launches: tuple[Launch | Copy, ...]
    arena: int
    env: Mapping[str, Buffer] = field(default_factory=dict)
    logits: Buffer | None = None


def plan_key(component: str, kind: str, graph: str) -> str:
    """The name of a block type's plan: transformer/double.k2, or transformer/embed."""
    return f"{component}/{kind}.k{graph}" if graph else f"{component}/{kind}"


def sizes_of(component: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, int]:
    """What each named dimension of a component's inputs measures, given arrays.

    An input's "8*latent_height" says what latent_height is.
    """
    sizes: dict[str, int] = {}
    for name, row in component["inputs"].items():
        for dim, size in zip(row["shape"], inputs[name].shape, strict=True):
            if isinstance(dim, str):
                factor, names = dimension_terms(dim)[0]
                multiple = len(names) == 1 and "+" not in dim and dim != "tokens"
                sizes |= {names[0]: size // factor} if multiple else {dim: size}
    return sizes


def one_call(
    component: Mapping[str, Any], kind: str, prefix: str, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """A component of one block alone; `plan` is its plan's row of `tensors`, which has shapes."""
    row = component["types"][kind]
    read = {tensor["name"]: tensor for tensor in plan["inputs"] if tensor["name"] in row["inputs"]}
    return {
        **component,
        "groups": {},
        "program": [{"type": kind, "prefix": prefix}],
        "types": {kind: {**row, "inputs": [name for name in row["inputs"] if name in read]}},
        "inputs": read,
        "outputs": dict(zip(row["outputs"], plan["outputs"], strict=True)),
    }


def dimension_terms(dim: int | str) -> list[tuple[int, list[str]]]:
    """A dimension as a sum of products: "8*latent_height", "batch*text_tokens + 2".

    Each is a factor and the names it multiplies; "tokens" stands for image and text tokens.
    """
    if isinstance(dim, int):
        return [(dim, [])]
    result = []
    for term in ("image_tokens + text_tokens" if dim == "tokens" else dim).split("+"):
        parts = [part.strip() for part in term.split("*")]
        factor = math.prod(int(part) for part in parts if part.isdecimal())
        result.append((factor, [part for part in parts if not part.isdecimal()]))
    return result


def dimension_size(dim: int | str, sizes: Mapping[str, int]) -> int:
    """A dimension in numbers, given the sizes of the names in it."""
    if isinstance(dim, str) and dim in sizes:
        return sizes[dim]
    terms = dimension_terms(dim)
    if any(name not in sizes for _, names in terms for name in names):
        raise ValueError(
            f"a plan's tensor has a dimension {dim!r}, expected one of {', '.join(sorted(sizes))};"
            " export the bundle again."
        )
    return sum(factor * math.prod(sizes[name] for name in names) for factor, names in terms)


def profile_of(
    profiles: Mapping[str, Sequence[int]], component: str, dim: str
) -> Sequence[int] | None:
    """(min, opt, max) of a dimension; "text_encoder.text_tokens" goes before "text_tokens"."""
    return profiles.get(f"{component}.{dim}", profiles.get(dim))


def check_profiles(
    target: str, component: str, row: Mapping[str, Any], sizes: Mapping[str, int]
) -> None:
    """ValueError for sizes outside what a target's plans were built for."""
    for name, size in sizes.items():
        low, _, high = profile_of(row["profiles"], component, name) or (size, size, size)
        if not low <= size <= high:
            raise ValueError(
                f"{name.replace('_', ' ')} is {size}, expected {low} to {high}, the range that the"
                f" plans {target} were built for; use --backend ort, or a size in that range."
            )


def make_launch_schedule(
    name: str,
    component: Mapping[str, Any],
    plans: Mapping[str, Any],
    sizes: Mapping[str, int],
    top_k: int | None,
    segments: Mapping[str, Sequence[str]] | None = None,
    *,
    section: Section | None = None,
    added: Added | None = None,
) -> LaunchSchedule:
    """The launches of component `name` at `sizes` with `top_k`, and where its tensors lie.

    `plans` is a target's row of the manifest; its `tensors` give every plan's inputs and outputs
    in order. `segments` names the launches that a block's whole plan is replaced with: a later one
    reads earlier ones' outputs by name, the last one's outputs are the block's. `section`: of the
    program, that alone; `added`: see run_program. Raises ValueError where the program and the plans
    do not go together.
    """
    section = section or Section()
    launches: list[Launch | Copy] = []
    local = dict(sizes)  # of the current call: samples that do not choose a block are not in it

    def buffer_of(row: Mapping[str, Any], buffer: str) -> Buffer:
        shape = tuple(dimension_size(dim, local) for dim in row["shape"])
        return Buffer(buffer, row["dtype"], shape)

    def launch(plan: str, values: dict[str, Buffer], prefix: str, out: Sequence[str]) -> None:
        """Launch a plan on values and weights by name; its outputs enter `values` as `out`."""
        if plan not in plans["tensors"]:
            known = ", ".join(sorted(plans["tensors"]))
            raise ValueError(f"the bundle has no plan {plan}, only {known}; export it again.")
        rows = plans["tensors"][plan]
        bound, weights = {}, {}
        for row in rows["inputs"]:  # a graph need not read every value of its call
            tensor = row["name"]
            if tensor not in values:
                weights[tensor] = prefix + tensor
                continue
            value, wanted = values[tensor], buffer_of(row, tensor)
            if value.dtype == "":  # a component's input takes the dtype that its plan reads
                value.dtype = wanted.dtype
            if (value.dtype, value.shape) != (wanted.dtype, wanted.shape):
                raise ValueError(
                    f"plan {plan} reads {tensor} as {wanted.dtype} {list(wanted.shape)}, expected"
                    f" {value.dtype} {list(value.shape)} from the call before it;"
                    " export the bundle again."
                )
            bound[tensor] = value
        written = [row["name"] for row in rows["outputs"]]
        outputs = map(buffer_of, rows["outputs"], out or written)
        launches.append(Launch(plan, bound, dict(zip(written, outputs, strict=True)), weights))
        values.update(launches[-1].outputs)

    def call(index: int, kind: str, key: str, prefix: str, inputs: list[Any]) -> list[Buffer]:
        # A block's call is a launch of its whole plan, or one of each of its segments.
        local.update(sizes)
        if index in section.runs:
            local["batch"] = len(section.runs[index])
        row, plan = component["types"][kind], plan_key(name, kind, key)
        values = dict(zip(row["inputs"], inputs, strict=True))
        *first, last = (segments or {}).get(plan, [plan])
        for segment in first:
            launch(segment, values, prefix, ())
        launch(last, values, prefix, row["outputs"])
        return list(launches[-1].outputs.values())

    inputs = {
        tensor: Buffer(tensor, "", tuple(dimension_size(dim, sizes) for dim in row["shape"]))
        for tensor, row in component["inputs"].items()
    }
    # The program is run on descriptions of tensors: `call` appends launches, `rows` copies of the
    # rows that samples choose. A later section goes on from where the one before has left them.
    before = inputs if section.env is None else dict(section.env)
    rows = BufferRows(launches)
    part: dict[str, Any] = {"begin": section.begin, "end": section.end, "runs": section.runs}
    env = run_program(component, before, top_k, call, **part, rows=rows, added=added)
    # Inputs that no launch of this section reads: later sections do, or nothing.
    for tensor, row in component["inputs"].items():
        read = read_as(name, component, plans, top_k, tensor)
        inputs[tensor].dtype = inputs[tensor].dtype or read or row["dtype"]
    # A section before the end keeps every tensor, since it is not known yet which calls come next;
    # the last one keeps the component's outputs alone, so that all other memory is free.
    logits = None
    last = section.end is None or section.end == len(component["program"])
    if section.router is not None:
        kind = section.router["type"]
        values = [env[tensor] for tensor in component["types"][kind]["inputs"]]
        (logits,) = call(-1, kind, "", section.router["prefix"], values)
    outputs = {tensor: env[tensor] for tensor in component["outputs"]} if last else {}
    kept = list((outputs if last else env).values())
    kept += [] if logits is None else [logits]
    # Only now is it known how long each buffer is needed.
    arena = place_buffers(list(before.values()), launches, kept)
    uploads = inputs if section.env is None else {}
    return LaunchSchedule(uploads, outputs, tuple(launches), arena, env, logits)


def read_as(
    name: str,
    component: Mapping[str, Any],
    plans: Mapping[str, Any],
    top_k: int | None,
    tensor: str,
) -> str | None:
    """The dtype in which the first plan that reads a component's input does so."""
    for step in component["program"]:
        kind = component["types"][step["type"]]
        plan = plan_key(name, step["type"], graph_key(kind, top_k))
        for row in plans["tensors"].get(plan, {"inputs": []})["inputs"]:
            if row["name"] == tensor and tensor in kind["inputs"]:
                return str(row["dtype"])
        if tensor in kind["outputs"]:
            return None
    return None
