"""The anatomy of a FLUX.1 transformer: every weight's size and what a step multiplies by it.

Torch-free: a config's numbers are enough, no weight is read. Names are diffusers' and d2m's own, so
that the list can be held against a real model weight by weight. Shape letters: D width, N image and
text tokens together, E experts, H expert hidden (D/4), S shared hidden (D), K chosen, m blocks of a
group. Another family is another file like d2m/anatomy_sd3.py.

FLOPs follow torch's FlopCounterMode for a batch of one: 2 per multiply-add of matrix products and
of attention's two products (4 N^2 D a block); biases, norms, activations and softmax are not
counted. A matrix of `used` weights that T rows pass through costs 2 T used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from d2m.families import FLUX, Family, hidden_sizes
from d2m.recipe import SparseSpec
from d2m.structure import AdaLN, Blocks, lowrank_default

PARTS = (
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
LISTS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
MODULATIONS = {"double": 12, "single": 3}  # vectors of D a block takes from AdaLN
NORMS = {"double": ("norm1", "norm1_context"), "single": ("norm",)}


@dataclass(frozen=True)
class Structure:
    """What is sparse beside a model's config; the defaults are the dense model's."""

    spec: SparseSpec | None = None
    blocks: Blocks = field(default_factory=Blocks)
    adaln: AdaLN = field(default_factory=AdaLN)


@dataclass(frozen=True)
class Weight:
    """One weight: the part it belongs to, its size, how much of it a token uses, its FLOPs.

    kept: stays float32 whatever the rest is stored in; buffer: bytes of a buffer, no parameter.
    """

    part: str
    name: str
    size: int
    used: int
    flops: int = 0
    kept: bool = False
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


def anatomy(config: Mapping[str, Any], structure: Structure, image: int, text: int) -> list[Stack]:
    """All weights of the transformer of `config` (diffusers' fields) under `structure`.

    `image` and `text` are the numbers of tokens. ValueError where the experts' ratios do not make
    up the FFN; the blocks' indices have to be the model's (`check_depth`).
    """
    dim = dim_of(config)
    blocks, spec = structure.blocks, structure.spec
    depth = {"double": config["num_layers"], "single": config["num_single_layers"]}
    left = {kind: count - len(blocks.dropped(kind)) for kind, count in depth.items()}
    chunks = sum(MODULATIONS[kind] * count for kind, count in left.items())
    tokens = {"double": (image, text), "single": (image + text,)}
    inside = {"double": _double, "single": _single}
    rank = structure.adaln.rank or min(dim, lowrank_default(dim, chunks))
    first = (*_embedders(config, dim, image, text), *shared_modulation(structure.adaln, dim, rank))
    stacks = [Stack("", 1, 1, first)]
    for kind, name in LISTS.items():
        for own, count, running in alike(blocks, spec, kind, depth[kind]):
            weights = (
                *inside[kind](config, own, dim, *tokens[kind]),  # type: ignore[operator]
                *modulated(structure.adaln, norms_of(kind), dim, rank),
            )
            stacks.append(Stack(f"{name}.*.", count, running, weights))
        for group in blocks.groups(kind):
            weights = tuple(router(dim, len(group), blocks))
            stacks.append(Stack(f"{name}.{group[0]}.router.", 1, 1, weights))
    return [*stacks, Stack("", 1, 1, tuple(output(config, dim, image)))]


def dim_of(config: Mapping[str, Any]) -> int:
    """D, of a transformer's config."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def norms_of(kind: str) -> list[tuple[str, int]]:
    """(name, chunks of width D) of a block's modulated norms."""
    return [(name, MODULATIONS[kind] // len(NORMS[kind])) for name in NORMS[kind]]


def used_share(dim: int, spec: SparseSpec | None, family: Family = FLUX) -> float:
    """The share of an FFN's matrices that a token uses: (r_s + K r_n) / r, .375 for 1S12E2A.

    The mean over all FFNs where they differ: two in a double block, one in a single.
    """
    if spec is None:
        return 1.0
    hidden = family.ratio * dim
    used = []
    for kind, name in family.kinds:
        sites = sum(site.blocks == name for site in family.sites)
        for i in range(len(spec.shares.of(kind)) or 1):
            shared, expert = hidden_sizes(dim, hidden, spec.at(kind, i))
            used += [(shared + spec.top_k * expert) / hidden] * sites
    return sum(used) / len(used)


def alike(
    blocks: Blocks, spec: SparseSpec | None, kind: str, depth: int
) -> Iterator[tuple[SparseSpec | None, int, int]]:
    """(structure, blocks that have it, blocks of them that run) of a kind's blocks."""
    place = {i: spec.at(kind, i) if spec else None for i in range(depth)}
    left = [i for i in place if i not in blocks.dropped(kind)]
    skipped = {group[0]: len(group) - blocks.kappa for group in blocks.groups(kind)}
    for own in dict.fromkeys(place.values()) or [spec]:
        mine = [i for i in left if place[i] == own]
        yield own, len(mine), len(mine) - sum(skipped.get(i, 0) for i in mine)


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


def _embedders(config: Mapping[str, Any], dim: int, image: int, text: int) -> Iterator[Weight]:
    embeds = {"timestep_embedder": TIME_CHANNELS, "text_embedder": config["pooled_projection_dim"]}
    if config["guidance_embeds"]:
        embeds["guidance_embedder"] = TIME_CHANNELS
    for name, inputs in embeds.items():
        for last, width in (("linear_1", inputs), ("linear_2", dim)):
            yield from linear("embedders", f"time_text_embed.{name}.{last}", width, dim, 1)
    yield from linear("embedders", "context_embedder", config["joint_attention_dim"], dim, text)
    yield from linear("embedders", "x_embedder", config["in_channels"], dim, image)


def output(config: Mapping[str, Any], dim: int, image: int) -> Iterator[Weight]:
    """The last norm and projection, of every family that has diffusers' AdaLayerNormContinuous."""
    channels = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
    yield from linear("output", "norm_out.linear", dim, 2 * dim, 1)
    yield from linear("output", "proj_out", dim, channels, image)


def _double(
    config: Mapping[str, Any], spec: SparseSpec | None, dim: int, image: int, text: int
) -> Iterator[Weight]:
    part, head = "double_attention", config["attention_head_dim"]
    streams = (
        ("ff", image, ("to_q", "to_k", "to_v", "to_out.0"), ("norm_q", "norm_k")),
        (
            "ff_context",
            text,
            ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            ("norm_added_q", "norm_added_k"),
        ),
    )
    for ffn, rows, linears, norms in streams:
        for name in linears:
            yield from linear(part, f"attn.{name}", dim, dim, rows)
        for name in norms:
            yield vector(part, f"attn.{name}.weight", head)
        if spec is None:
            yield from linear("double_ffn", f"{ffn}.net.0.proj", dim, FLUX.ratio * dim, rows)
            yield from linear("double_ffn", f"{ffn}.net.2", FLUX.ratio * dim, dim, rows)
        else:
            yield from sparse_ffn("double_ffn", ffn, dim, spec, rows)
    yield Weight(part, "attn", 0, 0, 4 * (image + text) ** 2 * dim)


def _single(
    config: Mapping[str, Any], spec: SparseSpec | None, dim: int, rows: int
) -> Iterator[Weight]:
    part = "single_attention"
    for name in ("to_q", "to_k", "to_v"):
        yield from linear(part, f"attn.{name}", dim, dim, rows)
    for name in ("norm_q", "norm_k"):
        yield vector(part, f"attn.{name}.weight", config["attention_head_dim"])
    yield Weight(part, "attn", 0, 0, 4 * rows**2 * dim)
    if spec is None:  # proj_out maps attention and FFN together: its weight is counted in two parts
        yield from linear("single_ffn", "proj_mlp", dim, FLUX.ratio * dim, rows)
        yield from linear(part, "proj_out", dim, dim, rows, bias=False)
        yield from linear("single_ffn", "proj_out", FLUX.ratio * dim, dim, rows)
    else:
        yield from linear(part, "proj_out.linear", dim, dim, rows, bias=False)
        yield from sparse_ffn("single_ffn", "proj_mlp", dim, spec, rows)


def sparse_ffn(part: str, name: str, dim: int, spec: SparseSpec, rows: int) -> Iterator[Weight]:
    """A SparseFFN: of the experts' weights K of E work. With K = 0 the gate is not evaluated."""
    shared, hidden = hidden_sizes(dim, FLUX.ratio * dim, spec)
    experts, k = spec.num_experts, spec.top_k
    yield from linear(part, f"{name}.shared.fc1", dim, shared, rows)
    yield from linear(part, f"{name}.shared.fc2", shared, dim, rows)
    gate = experts * dim
    yield Weight(part, f"{name}.gate.weight", gate, gate, 2 * rows * gate if k else 0, kept=True)
    for weight in ("w1", "w2"):
        used = k * dim * hidden
        size = experts * dim * hidden
        yield Weight(part, f"{name}.experts.{weight}", size, used, 2 * rows * used)
    yield Weight(part, f"{name}.experts.b1", experts * hidden, k * hidden)
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


def shared_modulation(adaln: AdaLN, dim: int, rank: int, chunks: int = 6) -> Iterator[Weight]:
    """What all blocks share of AdaLN: PixArt's Linear(D, 6 D), or a Linear(D, rank) (ours).

    chunks: those of the norm that has most.
    """
    if adaln.mode == "single":
        yield from linear("adaln", "modulation.linear", dim, chunks * dim, 1)
    if adaln.mode == "lowrank":
        yield from linear("adaln", "modulation.linear", dim, rank, 1, bias=False)


def router(dim: int, size: int, blocks: Blocks) -> Iterator[Weight]:
    """A group's router: W_x [m, 2 D] for pooled image and text tokens, W_y [m, D] (read).

    It is not asked where all m blocks run, and looks at no token with alpha = 0.
    """
    asked = blocks.kappa < size
    for name, inputs, runs in (("tokens", 2 * dim, blocks.alpha > 0), ("embedding", dim, True)):
        flops = 2 * inputs * size if asked and runs else 0
        yield Weight("routers", f"{name}.weight", inputs * size, inputs * size, flops, kept=True)
