"""Kernels without a GPU: a "cubin" that names its kernel and constants, and numpy that runs it.

`stand_in` takes the place of d2m.kernels.compile.compile_launch; `run` does what a launch of such a
cubin would, on addresses of host memory, program by program as far as results depend on it.
"""

import ctypes
import json
from typing import Any

import numpy as np

from d2m.kernels.compile import Compiled
from d2m.kernels.plan import Launch, Plan

DTYPES = {"fp32": "f4", "i32": "i4", "fp16": "f2", "bf16": "u2"}


def stand_in(plan: Plan, launch: Launch, sm: int, ptx_version: int | None = None) -> Compiled:
    """As compile_launch; parameters in the order of the plan, two scratch pointers after them."""
    kinds = [
        (name, f"*{plan.dtype(value)}" if isinstance(value, str) else "i32")
        for name, value in launch.arguments
    ]
    names = [name for name, _ in kinds] + ["scratch0", "scratch1"]
    entry = launch.kernel
    rows = ",\n".join(f"\t.param .u64 {entry}_{name}" for name in names)
    body = "".join(f"\tld.param.b64 %rd1, [{entry}_{name}];\n" for name in names[:-2])
    loc = '\t.file 1 "/secret/place.py"\n\t.loc 1 2 3\n'
    ptx = f".version 8.7\n.visible .entry {entry}(\n{rows}\n)\n.reqntid 128\n{{\n{loc}{body}}}\n"
    code = {"kernel": entry, "sm": sm, "constants": dict(launch.constants), "kinds": kinds}
    cubin = json.dumps(code, sort_keys=True).encode()
    return Compiled(entry, sm, cubin, ptx, launch.warps, 1024, tuple(kinds), 2)


def at(address: int, dtype: str, count: int) -> np.ndarray:
    kind = np.dtype(DTYPES[dtype])
    return np.frombuffer((ctypes.c_uint8 * (count * kind.itemsize)).from_address(address), kind)


def run(cubin: bytes, grid: tuple[int, ...], values: list[int]) -> None:
    """Run one launch: `values` are addresses and integers by position, scratch pointers last."""
    code = json.loads(cubin)
    names = [name for name, _ in code["kinds"]]
    assert values[len(names) :] == [0, 0], "Triton's scratch pointers are null"
    kinds = {name: kind.lstrip("*") for name, kind in code["kinds"]}
    given = dict(zip(names, values))

    def tensor(name: str, *shape: int) -> np.ndarray:
        return at(given[name], kinds[name], int(np.prod(shape))).reshape(shape)

    while len(grid) > 1 and grid[-1] == 1:
        grid = grid[:-1]
    KERNELS[code["kernel"]](code["constants"], grid, given, tensor)


def route(c: dict[str, Any], grid: tuple[int, ...], given: dict[str, int], tensor: Any) -> None:
    T, E, K = given["T"], c["E"], c["K"]
    assert grid == (-(-T // c["BLOCK_T"]),)
    logits = tensor("logits", T, E)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    gates = weights / weights.sum(1, keepdims=True)
    chosen = np.argsort(-gates, axis=1, kind="stable")[:, :K]
    tensor("chosen", T, K)[...] = chosen
    tensor("gates", T, K)[...] = np.take_along_axis(gates, chosen, 1)
    counts = tensor("counts", grid[0], c["E_PAD"])
    for block in range(grid[0]):
        rows = chosen[block * c["BLOCK_T"] : (block + 1) * c["BLOCK_T"]]
        counts[block] = np.bincount(rows.ravel(), minlength=c["E_PAD"])


def place(c: dict[str, Any], grid: tuple[int, ...], given: dict[str, int], tensor: Any) -> None:
    T, K, m, tiles = given["T"], c["K"], c["BLOCK_M"], given["tiles"]
    assert grid == (given["blocks"],)
    chosen, gates = tensor("chosen", T, K), tensor("gates", T, K)
    rows = tensor("counts", grid[0], c["E_PAD"]).sum(0)
    first = np.cumsum(-(-rows // m)) - -(-rows // m)
    tile_expert, tile_rows = tensor("tile_expert", tiles), tensor("tile_rows", tiles)
    tile_rows[...] = 0
    tensor("expert_slot", c["E_PAD"])[...] = first * m
    tensor("expert_rows", c["E_PAD"])[...] = rows
    slots, slot_token = tensor("slots", T, K), tensor("slot_token", tiles * m)
    slot_gate = tensor("slot_gate", tiles * m)
    for expert in range(c["E_PAD"]):
        tokens, which = np.nonzero(chosen == expert)
        where = first[expert] * m + np.arange(len(tokens))
        slots[tokens, which] = where
        slot_token[where], slot_gate[where] = tokens, gates[tokens, which]
        for tile in range(-(-len(tokens) // m)):
            tile_expert[first[expert] + tile] = expert
            tile_rows[first[expert] + tile] = min(m, len(tokens) - tile * m)


def up(c: dict[str, Any], grid: tuple[int, ...], given: dict[str, int], tensor: Any) -> None:
    D, H, m = c["D"], c["H"], c["BLOCK_M"]
    tiles = grid[0] // -(-H // c["BLOCK_N"])
    tile_expert, tile_rows = tensor("tile_expert", tiles), tensor("tile_rows", tiles)
    token, gate = tensor("slot_token", tiles * m), tensor("slot_gate", tiles * m)
    hidden = tensor("hidden", tiles * m, H)
    live = [tile for tile in range(tiles) if tile_rows[tile]]
    E = 1 + max((int(tile_expert[tile]) for tile in live), default=0)
    wide = H * (2 if c["GATED"] else 1)
    w1 = tensor("w1", E, D, wide)
    b1 = tensor("b1", E, wide) if c["BIAS"] else np.zeros((E, wide), "f4")
    for tile in live:
        rows = slice(tile * m, tile * m + tile_rows[tile])
        x = tensor("x", int(token[rows].max()) + 1, D)
        u = x[token[rows]] @ w1[tile_expert[tile]] + b1[tile_expert[tile]]
        if c["ACTIVATION"] == "swiglu":
            curved = u[:, :H] / (1 + np.exp(-u[:, :H])) * u[:, H:]
        else:
            assert c["ACTIVATION"] == "gelu_tanh"
            curved = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        hidden[rows] = gate[rows, None] * curved


def down(c: dict[str, Any], grid: tuple[int, ...], given: dict[str, int], tensor: Any) -> None:
    H, D, m = c["INNER"], c["OUTER"], c["BLOCK_M"]
    tiles = grid[0] // -(-D // c["BLOCK_N"])
    tile_expert, tile_rows = tensor("tile_expert", tiles), tensor("tile_rows", tiles)
    for tile in range(tiles):
        if tile_rows[tile]:
            w2 = tensor("w", int(tile_expert[tile]) + 1, H, D)[-1]
            rows = slice(tile * m, tile * m + tile_rows[tile])
            tensor("out", tiles * m, D)[rows] = tensor("a", tiles * m, H)[rows] @ w2


def combine(c: dict[str, Any], grid: tuple[int, ...], given: dict[str, int], tensor: Any) -> None:
    T, D, K = grid[0], c["D"], c["K"]  # a trailing 1 of a grid is not told apart
    assert (*grid, 1)[1] == -(-D // c["BLOCK_D"])
    slots = tensor("slots", T, K)
    rows = tensor("rows", int(slots.max()) + 1, D)
    tensor("y", T, D)[...] = rows[slots].sum(1)


KERNELS = {"route": route, "place": place, "up": up, "down": down, "combine": combine}
