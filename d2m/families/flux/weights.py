"""The weights of a FLUX.1 transformer by name: every one's size, and its use in a step.

Put together from the pieces of d2m/families/weights.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from d2m.families import weights as shared
from d2m.families.weights import TIME_CHANNELS, Stack, Structure, Weight
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
                inside = shared.single_block(config, own, dim, RATIO * dim, image + text)
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
