"""The weights of a FLUX.1 transformer by name: every one's size, and its use in a step.

Put together from the pieces of d2m/families/weights.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from d2m.families import weights as shared
from d2m.families.weights import TIME_CHANNELS, Stack, Structure, Weight
from d2m.recipe.recipe import SparseSpec
from d2m.recipe.structure import lowrank_default

LISTS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
RATIO = 4  # hidden neurons of an FFN over its width
MODULATIONS = {"double": 12, "single": 3}  # vectors of D a block takes from AdaLN
NORMS = {"double": ("norm1", "norm1_context"), "single": ("norm",)}


def weights(config: Mapping[str, Any], structure: Structure, image: int, text: int) -> list[Stack]:
    """See d2m.families.weights."""
    dim = shared.dim_of(config)
    blocks, spec = structure.blocks, structure.spec
    depth = {"double": config["num_layers"], "single": config["num_single_layers"]}
    left = {kind: count - len(blocks.dropped(kind)) for kind, count in depth.items()}
    chunks = sum(MODULATIONS[kind] * count for kind, count in left.items())
    rank = structure.adaln.rank or min(dim, lowrank_default(dim, chunks))
    first = (*_embedders(config, dim, image, text), *shared.modulation(structure.adaln, dim, rank))
    stacks = [Stack("", 1, 1, first)]
    for kind, name in LISTS.items():
        for own, count, running in shared.alike(blocks, spec, kind, depth[kind]):
            if kind == "double":
                streams = {"ff": image, "ff_context": text}
                inside = shared.joint_block(config, own, dim, RATIO * dim, streams)
            else:
                inside = _single(config, own, dim, image + text)
            norms = shared.modulated(structure.adaln, norms_of(kind), dim, rank)
            stacks.append(Stack(f"{name}.*.", count, running, (*inside, *norms)))
        stacks += shared.routers(name, kind, dim, blocks)
    return [*stacks, Stack("", 1, 1, tuple(shared.output(config, dim, image)))]


def norms_of(kind: str) -> list[tuple[str, int]]:
    """(name, chunks of width D) of a block's modulated norms."""
    return [(name, MODULATIONS[kind] // len(NORMS[kind])) for name in NORMS[kind]]


def _embedders(config: Mapping[str, Any], dim: int, image: int, text: int) -> Iterator[Weight]:
    embeds = {"timestep_embedder": TIME_CHANNELS, "text_embedder": config["pooled_projection_dim"]}
    if config["guidance_embeds"]:
        embeds["guidance_embedder"] = TIME_CHANNELS
    for name, inputs in embeds.items():
        for last, width in (("linear_1", inputs), ("linear_2", dim)):
            yield from shared.linear("embedders", f"time_text_embed.{name}.{last}", width, dim, 1)
    joint = config["joint_attention_dim"]
    yield from shared.linear("embedders", "context_embedder", joint, dim, text)
    yield from shared.linear("embedders", "x_embedder", config["in_channels"], dim, image)


def _single(
    config: Mapping[str, Any], spec: SparseSpec | None, dim: int, rows: int
) -> Iterator[Weight]:
    part = "single_attention"
    for name in ("to_q", "to_k", "to_v"):
        yield from shared.linear(part, f"attn.{name}", dim, dim, rows)
    for name in ("norm_q", "norm_k"):
        yield shared.vector(part, f"attn.{name}.weight", config["attention_head_dim"])
    yield Weight(part, "attn", 0, 0, 4 * rows**2 * dim)
    if spec is None:  # proj_out maps attention and FFN together: its weight is counted in two parts
        yield from shared.linear("single_ffn", "proj_mlp", dim, RATIO * dim, rows)
        yield from shared.linear(part, "proj_out", dim, dim, rows, bias=False)
        yield from shared.linear("single_ffn", "proj_out", RATIO * dim, dim, rows)
    else:
        yield from shared.linear(part, "proj_out.linear", dim, dim, rows, bias=False)
        yield from shared.sparse_ffn("single_ffn", "proj_mlp", dim, RATIO * dim, spec, rows)
