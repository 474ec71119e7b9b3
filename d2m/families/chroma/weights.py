"""The weights of a Chroma transformer by name: every one's size, and its use in a step.

Put together from the pieces of d2m/families/weights.py. Of modulation there is the approximator
alone, which all vectors of it pass through as tokens do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from d2m.families import weights as shared
from d2m.families.weights import Stack, Structure, Weight

LISTS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
RATIO = 4  # hidden neurons of an FFN over its width


def vectors(config: Mapping[str, Any]) -> int:
    """N, vectors of modulation: 12 of a double block, 3 of a single one, 2 of the last norm."""
    return int(12 * config["num_layers"] + 3 * config["num_single_layers"] + 2)


def weights(config: Mapping[str, Any], structure: Structure, image: int, text: int) -> list[Stack]:
    """See d2m.families.weights."""
    dim, blocks, spec = shared.dim_of(config), structure.blocks, structure.spec
    depth = {"double": int(config["num_layers"]), "single": int(config["num_single_layers"])}
    stacks = [Stack("", 1, 1, tuple(_before(config, dim, image, text)))]
    for kind, name in LISTS.items():
        for own, count, running in shared.alike(blocks, spec, kind, depth[kind]):
            if kind == "double":
                streams = {"ff": image, "ff_context": text}
                inside = shared.joint_block(config, own, dim, RATIO * dim, streams)
            else:
                inside = shared.single_block(config, own, dim, RATIO * dim, image + text)
            stacks.append(Stack(f"{name}.*.", count, running, tuple(inside)))
        stacks += shared.routers(name, kind, dim, blocks)
    channels = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
    last = shared.linear("output", "proj_out", dim, channels, image)
    return [*stacks, Stack("", 1, 1, tuple(last))]


def _before(config: Mapping[str, Any], dim: int, image: int, text: int) -> Iterator[Weight]:
    joint = config["joint_attention_dim"]
    yield from shared.linear("embedders", "context_embedder", joint, dim, text)
    yield from shared.linear("embedders", "x_embedder", config["in_channels"], dim, image)
    part, name, hidden = "adaln", "distilled_guidance_layer", config["approximator_hidden_dim"]
    rows, channels = vectors(config), config["approximator_num_channels"]
    yield from shared.linear(part, f"{name}.in_proj", channels, hidden, rows)
    for i in range(config["approximator_layers"]):
        for each in ("linear_1", "linear_2"):
            yield from shared.linear(part, f"{name}.layers.{i}.{each}", hidden, hidden, rows)
        yield shared.vector(part, f"{name}.norms.{i}.weight", hidden)
    yield from shared.linear(part, f"{name}.out_proj", hidden, dim, rows)
