"""What one call launches, as data: tensors, workspaces, and kernels with grids and arguments.

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen. Nothing is imported beyond
configs.py: the launcher (op.py), the ahead-of-time compiler (compile.py) and packaging all read
the same plan, so none of them can drift from the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from d2m.families.site import GATED, up_rows
from d2m.kernels.configs import Tile, Tiles, next_power

# Tensor name -> dtype and shape.
Shapes = dict[str, tuple[str, tuple[int, ...]]]
Constants = tuple[tuple[str, int | bool | str], ...]
MAPS = "slot_token slot_gate tile_expert tile_rows"  # tensors of `place` that the others read

# Kernel name -> where it is defined.
KERNELS = {
    "route": "d2m.kernels.routing:route",
    "place": "d2m.kernels.placement:place",
    "up": "d2m.kernels.up:up",
    "down": "d2m.kernels.down:down",
    "combine": "d2m.kernels.down:combine",
    "combine_residual": "d2m.kernels.down:combine_residual",
    "hidden_backward": "d2m.kernels.backward:hidden_backward",
    "weight_backward": "d2m.kernels.backward:weight_backward",
    "gate_backward": "d2m.kernels.backward:gate_backward",
}


@dataclass(frozen=True)
class Sizes:
    """T tokens, D width, E experts, H expert hidden, K chosen, the dtype of x and weights, what
    experts do between their matrices, and whether there is b1."""

    tokens: int
    width: int
    experts: int
    hidden: int
    top_k: int
    dtype: str
    activation: str = "gelu_tanh"
    bias: bool = True

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def columns(self) -> int:
        """Of an expert's W1: H, or 2 H of a gated one, the gates' first."""
        return self.hidden * up_rows(self.activation)


@dataclass(frozen=True)
class Launch:
    """One kernel: arguments by parameter name (a tensor's name, or an integer), then constants."""

    label: str
    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[tuple[str, str | int], ...]
    constants: Constants
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Plan:
    """`inputs` the caller brings, `outputs` it receives, `work` is scratch: name -> dtype, shape.

    dtypes are "i32", "fp32", "fp16", "bf16"; all tensors are contiguous. No launch needs any tensor
    cleared before. `launches` run in order on one stream.
    """

    inputs: Shapes
    outputs: Shapes
    work: Shapes
    launches: tuple[Launch, ...]

    def dtype(self, name: str) -> str:
        """The dtype of any tensor of the plan."""
        return {**self.inputs, **self.outputs, **self.work}[name][0]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tiles_bound(sizes: Sizes, m: int) -> int:
    """The most row tiles that T*K pairs over E experts can fill, whatever the routing.

    Every expert that has rows leaves at most m - 1 empty; so the grid is known without the counts.
    """
    pairs = sizes.tokens * sizes.top_k
    return (pairs + min(sizes.experts, pairs) * (m - 1)) // m


def _arguments(same: str, **others: str | int) -> tuple[tuple[str, str | int], ...]:
    """Arguments by parameter name; those in `same` are tensors of the parameter's own name."""
    return (*((name, name) for name in same.split()), *others.items())


def _matmul(
    label: str, kernel: str, grid: tuple[int, ...], arguments: Any, tile: Tile, **constants: Any
) -> Launch:
    """A launch whose tile says how large its blocks are and how many warps and stages it takes."""
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    # tf32 would lose 10 bits of float32; "ieee" has no meaning for the 16-bit dtypes.
    every: Constants = (*constants.items(), ("PRECISION", "ieee"))
    return Launch(label, kernel, grid, arguments, every, tile.warps, tile.stages)


def _placement(sizes: Sizes, tiles: Tiles) -> tuple[Shapes, list[Launch]]:
    """route and place, and the tensors they fill: the same in forward and backward."""
    T, K, E = sizes.tokens, sizes.top_k, sizes.experts
    pad, blocks, bound = next_power(E), ceil_div(T, tiles.block_t), tiles_bound(sizes, tiles.m)
    work: Shapes = {
        "gates": ("fp32", (T, K)),
        "chosen": ("i32", (T, K)),
        "counts": ("i32", (blocks, pad)),
        "slots": ("i32", (T, K)),
        "slot_token": ("i32", (bound * tiles.m,)),
        "slot_gate": ("fp32", (bound * tiles.m,)),
        "tile_expert": ("i32", (bound,)),
        "tile_rows": ("i32", (bound,)),
        "expert_slot": ("i32", (pad,)),
        "expert_rows": ("i32", (pad,)),
    }
    route = Launch(
        "route",
        "route",
        (blocks,),
        _arguments("logits gates chosen counts", T=T),
        (("E", E), ("K", K), ("E_PAD", pad), ("BLOCK_T", tiles.block_t)),
    )
    filled = "chosen gates counts slots slot_token slot_gate tile_expert tile_rows expert_slot"
    place = Launch(
        "place",
        "place",
        (blocks,),
        _arguments(f"{filled} expert_rows", T=T, blocks=blocks, tiles=bound),
        (("K", K), ("E_PAD", pad), ("BLOCK_T", tiles.block_t), ("BLOCK_M", tiles.m), ("CHUNK", 64)),
    )
    return work, [route, place]


def _down(label: str, a: str, w: str, out: str, sizes: Sizes, tile: Tile, bound: int) -> Launch:
    grid = (bound * ceil_div(sizes.width, tile.n),)
    arguments = _arguments("tile_expert tile_rows", a=a, w=w, out=out)
    back = label == "dx"  # times W1 transposed
    inner = sizes.columns if back else sizes.hidden
    constants = {"INNER": inner, "OUTER": sizes.width, "TRANSPOSED": back}
    return _matmul(label, "down", grid, arguments, tile, **constants)


def _combine(label: str, rows: str, out: str, sizes: Sizes) -> Launch:
    # 1024 columns: 4 warps x 32 lanes x 8 numbers of 16 bits, one 16-byte load each.
    block = min(1024, next_power(sizes.width))
    return Launch(
        label,
        "combine",
        (sizes.tokens, ceil_div(sizes.width, block)),
        _arguments("slots", rows=rows, y=out),
        (("D", sizes.width), ("K", sizes.top_k), ("BLOCK_D", block)),
        4 if block >= 1024 else 1,
    )


def _inputs(sizes: Sizes) -> Shapes:
    T, D, E, H = sizes.tokens, sizes.width, sizes.experts, sizes.hidden
    inputs: Shapes = {
        "x": (sizes.dtype, (T, D)),
        "logits": ("fp32", (T, E)),
        "w1": (sizes.dtype, (E, D, sizes.columns)),
        "b1": (sizes.dtype, (E, sizes.columns)),
        "w2": (sizes.dtype, (E, H, D)),
    }
    if not sizes.bias:
        del inputs["b1"]
    return inputs


def _kind(sizes: Sizes) -> tuple[str, dict[str, str], dict[str, Any]]:
    """The weights' arguments of `up` and `hidden_backward` by name, others, and constants.

    Without biases another tensor stands in for b1: the kernel does not touch it.
    """
    own: dict[str, Any] = {"ACTIVATION": sizes.activation, "GATED": sizes.gated, "BIAS": sizes.bias}
    return ("w1 b1", {}, own) if sizes.bias else ("w1", {"b1": "w1"}, own)


@lru_cache(maxsize=256)
def forward_plan(sizes: Sizes, tiles: Tiles) -> Plan:
    """y [T, D] of `d2m::routed_experts`: route, place, up, down, combine. T >= 1, 1 <= K <= E."""
    work, launches = _placement(sizes, tiles)
    bound = tiles_bound(sizes, tiles.m)
    work["hidden"] = (sizes.dtype, (bound * tiles.m, sizes.hidden))
    work["rows"] = (sizes.dtype, (bound * tiles.m, sizes.width))
    grid = (bound * ceil_div(sizes.hidden, tiles.up.n),)
    weights, others, own = _kind(sizes)
    arguments = _arguments(f"x {weights} {MAPS} hidden", **others)
    constants = {"D": sizes.width, "H": sizes.hidden, **own}
    launches.append(_matmul("up", "up", grid, arguments, tiles.up, **constants))
    launches.append(_down("down", "hidden", "w2", "rows", sizes, tiles.down, bound))
    launches.append(_combine("combine", "rows", "y", sizes))
    outputs: Shapes = {"y": (sizes.dtype, (sizes.tokens, sizes.width))}
    return Plan(_inputs(sizes), outputs, work, tuple(launches))


@lru_cache(maxsize=256)
def residual_plan(sizes: Sizes, tiles: Tiles, sample_tokens: int) -> Plan:
    """The forward whose last kernel ends the block: y = residual + scale * (shared + routed).

    For inference. shared, residual [T, D], scale [T / sample_tokens, D]: AdaLN's gate by sample.
    """
    plan = forward_plan(sizes, tiles)
    *launches, combine = plan.launches
    arguments = _arguments("rows slots shared residual scale y", sample_tokens=sample_tokens)
    name = "combine_residual"
    last = replace(combine, label=name, kernel=name, arguments=arguments)
    kind, (tokens, width) = sizes.dtype, (sizes.tokens, sizes.width)
    more: Shapes = {
        "shared": (kind, (tokens, width)),
        "residual": (kind, (tokens, width)),
        "scale": (kind, (ceil_div(tokens, sample_tokens), width)),
    }
    return replace(plan, inputs={**plan.inputs, **more}, launches=(*launches, last))


@lru_cache(maxsize=256)
def backward_plan(sizes: Sizes, tiles: Tiles, need_x: bool, need_weights: bool) -> Plan:
    """dx, dlogits, dw1, db1, dw2 from dy [T, D] and the forward's inputs; nothing else was kept.

    Scratch is 2 T K H numbers (3 T K H of gated experts), and T K D more for dx.
    """
    work, launches = _placement(sizes, tiles)
    T, D, E, H = sizes.tokens, sizes.width, sizes.experts, sizes.hidden
    bound, tile = tiles_bound(sizes, tiles.m), tiles.hidden_backward
    parts, slots = ceil_div(H, tile.n), bound * tiles.m
    work["hidden"] = (sizes.dtype, (slots, H))
    work["dbefore"] = (sizes.dtype, (slots, sizes.columns))
    work["dgate_parts"] = ("fp32", (parts, slots))
    held, others, own = _kind(sizes)
    names = f"dy x {held} w2 {MAPS} hidden dbefore dgate_parts"
    arguments = _arguments(names, **others, slots_in_all=slots)
    name, wide = "hidden_backward", {"D": D, "H": H, **own}
    launches.append(_matmul(name, name, (bound * parts,), arguments, tile, **wide))
    outputs: Shapes = {"dlogits": ("fp32", (T, E))}
    constants = {"E": E, "K": sizes.top_k, "E_PAD": next_power(E), "PARTS": parts}
    launches.append(
        Launch(
            "gate_backward",
            "gate_backward",
            (ceil_div(T, tiles.block_t),),
            _arguments("logits chosen slots dgate_parts dlogits", T=T, slots_in_all=slots),
            (*constants.items(), ("BLOCK_T", tiles.block_t)),
        )
    )
    if need_x:
        work["rows"] = (sizes.dtype, (slots, D))
        outputs["dx"] = (sizes.dtype, (T, D))
        launches.append(_down("dx", "dbefore", "w1", "rows", sizes, tiles.dx, bound))
        launches.append(_combine("combine_dx", "rows", "dx", sizes))
    if need_weights:
        weights = ("dw1", "db1", "dw2") if sizes.bias else ("dw1", "dw2")
        outputs |= {name: _inputs(sizes)[name[1:]] for name in weights}
        # A stand-in of dw2, and where there are no biases: without BIAS the kernel leaves it alone.
        db = weights[1]
        first = (D, sizes.columns)
        launches.append(_weights("dw1", "x", "dbefore", db, first, sizes, tiles.weights))
        launches.append(_weights("dw2", "hidden", "dy", db, (H, D), sizes, tiles.weights))
    return Plan({"dy": (sizes.dtype, (T, D)), **_inputs(sizes)}, outputs, work, tuple(launches))


def _weights(
    label: str, a: str, b: str, db: str, shape: tuple[int, int], sizes: Sizes, tile: Tile
) -> Launch:
    first = label == "dw1"
    grid = (ceil_div(shape[0], tile.m) * ceil_div(shape[1], tile.n), sizes.experts)
    arguments = _arguments("slot_token expert_slot expert_rows", a=a, b=b, dw=label, db=db)
    constants = {"M": shape[0], "N": shape[1], "GATHER_A": first, "GATHER_B": not first}
    constants["BIAS"] = first and sizes.bias
    return _matmul(label, "weight_backward", grid, arguments, tile, **constants)
