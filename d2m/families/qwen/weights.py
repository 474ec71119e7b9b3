"""The weights of a Qwen-Image transformer by name: every one's size, and its use in a step.

Put together from the pieces of d2m/families/weights.py. All blocks are alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from d2m.families import weights as shared
from d2m.families.weights import TIME_CHANNELS, Stack, Structure, Weight
from d2m.recipe.structure import lowrank_default

LIST = "transformer_blocks"
RATIO = 4  # hidden neurons of an FFN over its width
NORMS = (("img_mod", 6), ("txt_mod", 6))  # (name, chunks of width D)


def weights(config: Mapping[str, Any], structure: Structure, image: int, text: int) -> list[Stack]:
    """See d2m.families.weights; text: tokens of the prompt, without the template's."""
    dim, depth, blocks = shared.dim_of(config), int(config["num_layers"]), structure.blocks
    chunks = 12 * (depth - len(blocks.dropped("double")))
    rank = structure.adaln.rank or min(dim, lowrank_default(dim, chunks))
    common = shared.modulation(structure.adaln, dim, rank)
    stacks = [Stack("", 1, 1, (*_embedders(config, dim, image, text), *common))]
    streams = {"img_mlp": image, "txt_mlp": text}
    for spec, count, running in shared.alike(blocks, structure.spec, "double", depth):
        inside_block = (
            *shared.joint_block(config, spec, dim, RATIO * dim, streams),
            *shared.modulated(structure.adaln, NORMS, dim, rank, "1"),
        )
        stacks.append(Stack(f"{LIST}.*.", count, running, inside_block))
    stacks += shared.routers(LIST, "double", dim, blocks)
    return [*stacks, Stack("", 1, 1, tuple(shared.output(config, dim, image)))]


def _embedders(config: Mapping[str, Any], dim: int, image: int, text: int) -> Iterator[Weight]:
    for last, width in (("linear_1", TIME_CHANNELS), ("linear_2", dim)):
        name = f"time_text_embed.timestep_embedder.{last}"
        yield from shared.linear("embedders", name, width, dim, 1)
    yield shared.vector("embedders", "txt_norm.weight", config["joint_attention_dim"])
    yield from shared.linear("embedders", "img_in", config["in_channels"], dim, image)
    yield from shared.linear("embedders", "txt_in", config["joint_attention_dim"], dim, text)
