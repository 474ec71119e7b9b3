"""What the weights of all families are put together from: every weight's size and use in a step.

Torch-free: a config's numbers are enough, no weight is read. Names are diffusers' and d2m's own, so
that the list can be held against a real model weight by weight. Shape letters: D width, N image and
text tokens together, E experts, H expert hidden, S shared hidden, K chosen, m blocks of a group.
Each family has a file like d2m/families/sd3/weights.py, with a function

    weights(config, structure, image, text): all weights of the transformer of `config` (diffusers'
    fields) under `structure`, for so many image and text tokens. ValueError where the experts'
    ratios do not make up the FFN; the blocks' indices have to be the model's (`check_depth`).

FLOPs follow torch's FlopCounterMode for a batch of one: 2 per multiply-add of matrix products and
of attention's two products (4 N^2 D a block); biases, norms, activations and softmax are not
counted. A matrix of `used` weights that T rows pass through costs 2 T used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from d2m.families.site import up_rows
from d2m.recipe.recipe import SparseSpec, hidden_sizes
from d2m.recipe.structure import AdaLN, Blocks

COMPONENTS = (
    "embedders",
    "double_attention",
    "double_ffn",
    "single_attention",
    "single_ffn",
    "adaln",
    "routers",
    "output",
)
TIME_CHANNELS = 256  # read: diffusers' sinusoidal embedding of timestep and guidance


@dataclass(frozen=True)
class Structure:
    """What is sparse beside a model's config; the defaults are the dense model's."""

    spec: SparseSpec | None = None
    blocks: Blocks = field(default_factory=Blocks)
    adaln: AdaLN = field(default_factory=AdaLN)


@dataclass(frozen=True)
class Weight:
    """One weight: the part it belongs to, its size, how much of it a token uses, its FLOPs.

    float32: stays so whatever the rest is stored in; buffer: bytes of a buffer, no parameter.
    """

    part: str
    name: str
    size: int
    used: int
    flops: int = 0
    float32: bool = False
    buffer: int = 0


@dataclass(frozen=True)
class Stack:
    """Weights that occur `count` times, as a list of blocks does, and run `active` times.

    blocks: which of the list they are, where its blocks differ in the dense model; else ().
    """

    prefix: str
    count: int
    active: int
    weights: tuple[Weight, ...]
    blocks: tuple[int, ...] = ()


def dim_of(config: Mapping[str, Any]) -> int:
    """D, of a transformer's config."""
    if "dim" in config:
        return int(config["dim"])
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def alike(
    blocks: Blocks, spec: SparseSpec | None, kind: str, depth: int
) -> Iterator[tuple[SparseSpec | None, int, int]]:
    """(structure, blocks that have it, blocks of them that run) of a kind's blocks."""
    specs = {i: spec.at(kind, i) if spec else None for i in range(depth)}
    remaining = [i for i in specs if i not in blocks.dropped(kind)]
    skipped = {group[0]: len(group) - blocks.kappa for group in blocks.groups(kind)}
    for own in dict.fromkeys(specs.values()) or [spec]:
        indices = [i for i in remaining if specs[i] == own]
        yield own, len(indices), len(indices) - sum(skipped.get(i, 0) for i in indices)


# ---------------------------------------------------------------- weights


def linear(
    part: str, name: str, inputs: int, outputs: int, rows: int, bias: bool = True
) -> Iterator[Weight]:
    """A Linear that `rows` tokens pass through."""
    size = inputs * outputs
    yield Weight(part, f"{name}.weight", size, size, 2 * rows * size)
    if bias:
        yield Weight(part, f"{name}.bias", outputs, outputs)


def vector(part: str, name: str, size: int) -> Weight:
    return Weight(part, name, size, size)


def output(config: Mapping[str, Any], dim: int, image: int) -> Iterator[Weight]:
    """The last norm and projection, of every family that has diffusers' AdaLayerNormContinuous."""
    channels = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
    yield from linear("output", "norm_out.linear", dim, 2 * dim, 1)
    yield from linear("output", "proj_out", dim, channels, image)


def ffn(name: str, dim: int, neurons: int, spec: SparseSpec | None, rows: int) -> Iterator[Weight]:
    """diffusers' FeedForward of so many hidden neurons, or its SparseFFN."""
    if spec is None:
        yield from linear("double_ffn", f"{name}.net.0.proj", dim, neurons, rows)
        yield from linear("double_ffn", f"{name}.net.2", neurons, dim, rows)
    else:
        yield from sparse_ffn("double_ffn", name, dim, neurons, spec, rows)


def gated_ffn(
    part: str,
    name: str,
    linears: tuple[str, ...],
    dim: int,
    neurons: int,
    spec: SparseSpec | None,
    rows: int,
    activation: str = "swiglu",
    bias: bool = False,
) -> Iterator[Weight]:
    """A gated FFN, or its SparseFFN. linears: (gate, value, down), or (gate and value, down)."""
    if spec is not None:
        yield from sparse_ffn(part, name, dim, neurons, spec, rows, activation, bias)
        return
    *ups, down = linears
    for each in ups:
        yield from linear(part, f"{name}.{each}", dim, 2 * neurons // len(ups), rows, bias)
    yield from linear(part, f"{name}.{down}", neurons, dim, rows, bias)


def joint_block(
    config: Mapping[str, Any],
    spec: SparseSpec | None,
    dim: int,
    neurons: int,
    streams: Mapping[str, int],
) -> Iterator[Weight]:
    """A block of two streams that attend together, with norms of queries and keys.

    streams: FFN -> tokens, of the image, then of the text.
    """
    part, head = "double_attention", config["attention_head_dim"]
    own = ("to_q", "to_k", "to_v", "to_out.0"), ("norm_q", "norm_k")
    added = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    both = own, (added, ("norm_added_q", "norm_added_k"))
    for (name, rows), (linears, norms) in zip(streams.items(), both):
        for each in linears:
            yield from linear(part, f"attn.{each}", dim, dim, rows)
        for each in norms:
            yield vector(part, f"attn.{each}.weight", head)
        yield from ffn(name, dim, neurons, spec, rows)
    yield Weight(part, "attn", 0, 0, 4 * sum(streams.values()) ** 2 * dim)


def single_block(
    config: Mapping[str, Any], spec: SparseSpec | None, dim: int, neurons: int, rows: int
) -> Iterator[Weight]:
    """FLUX.1's block of both streams in one, whose `proj_out` maps attention and FFN together."""
    part = "single_attention"
    for name in ("to_q", "to_k", "to_v"):
        yield from linear(part, f"attn.{name}", dim, dim, rows)
    for name in ("norm_q", "norm_k"):
        yield vector(part, f"attn.{name}.weight", config["attention_head_dim"])
    yield Weight(part, "attn", 0, 0, 4 * rows**2 * dim)
    if spec is None:  # its weight is counted in two parts
        yield from linear("single_ffn", "proj_mlp", dim, neurons, rows)
        yield from linear(part, "proj_out", dim, dim, rows, bias=False)
        yield from linear("single_ffn", "proj_out", neurons, dim, rows)
    else:
        yield from linear(part, "proj_out.linear", dim, dim, rows, bias=False)
        yield from sparse_ffn("single_ffn", "proj_mlp", dim, neurons, spec, rows)


def sparse_ffn(
    part: str,
    name: str,
    dim: int,
    neurons: int,
    spec: SparseSpec,
    rows: int,
    activation: str = "gelu_tanh",
    bias: bool = True,
) -> Iterator[Weight]:
    """A SparseFFN made of a dense FFN's `neurons`: of the experts' weights K of E work.

    With K = 0 the gate is not evaluated. A gated FFN has two rows of the first matrix a neuron.
    """
    shared, hidden = hidden_sizes(neurons, spec)
    experts, k, up = spec.num_experts, spec.top_k, up_rows(activation)
    yield from linear(part, f"{name}.shared.fc1", dim, shared * up, rows, bias)
    yield from linear(part, f"{name}.shared.fc2", shared, dim, rows, bias)
    gate = experts * dim
    yield Weight(part, f"{name}.gate.weight", gate, gate, 2 * rows * gate if k else 0, float32=True)
    for weight, wide in (("w1", hidden * up), ("w2", hidden)):
        used = k * dim * wide
        size = experts * dim * wide
        yield Weight(part, f"{name}.experts.{weight}", size, used, 2 * rows * used)
    if bias:
        yield Weight(part, f"{name}.experts.b1", experts * hidden * up, k * hidden * up)
    yield Weight(part, f"{name}.neurons", 0, 0, buffer=8 * (shared + experts * hidden))


def modulated(
    adaln: AdaLN, norms: Iterable[tuple[str, int]], dim: int, rank: int, own: str = "linear"
) -> Iterator[Weight]:
    """A block's own part of AdaLN; norms: (name, chunks of width D); own: of a norm, its Linear."""
    for name, chunks in norms:
        outputs = chunks * dim
        if adaln.mode == "single":
            yield vector("adaln", f"{name}.table", outputs)
        elif adaln.mode == "lowrank":
            yield from linear("adaln", f"{name}.up", rank, outputs, 1)
        else:
            yield from linear("adaln", f"{name}.{own}", dim, outputs, 1)


def modulation(adaln: AdaLN, dim: int, rank: int, chunks: int = 6) -> Iterator[Weight]:
    """What all blocks share of AdaLN: PixArt's Linear(D, 6 D), or a Linear(D, rank) (ours).

    chunks: those of the norm that has most.
    """
    if adaln.mode == "single":
        yield from linear("adaln", "modulation.linear", dim, chunks * dim, 1)
    if adaln.mode == "lowrank":
        yield from linear("adaln", "modulation.linear", dim, rank, 1, bias=False)


def routers(
    name: str, kind: str, dim: int, blocks: Blocks, width: int | None = None
) -> list[Stack]:
    """The routers of a kind's groups in the model's list `name`; width: of temb, D by default."""
    sizes = {
        group: tuple(_router(dim, width or dim, len(group), blocks))
        for group in blocks.groups(kind)
    }
    return [Stack(f"{name}.{group[0]}.router.", 1, 1, own) for group, own in sizes.items()]


def _router(dim: int, width: int, size: int, blocks: Blocks) -> Iterator[Weight]:
    """A group's router: W_x [m, 2 D] for pooled image and text tokens, W_y [m, width] (read).

    It is not evaluated where all m blocks run, and reads no token with alpha = 0.
    """
    evaluated = blocks.kappa < size
    for name, inputs, runs in (("tokens", 2 * dim, blocks.alpha > 0), ("embedding", width, True)):
        flops = 2 * inputs * size if evaluated and runs else 0
        yield Weight("routers", f"{name}.weight", inputs * size, inputs * size, flops, float32=True)
