"""The anatomy of PixArt-Sigma's transformer: every weight's size, and its use in a step.

As d2m/anatomy.py, whose pieces it is put together from. All blocks are alike: attention of the
picture's tokens, attention of these to the text's, one FFN, and a table [6, D] that is added to the
modulation which all share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from d2m.anatomy import (
    TIME_CHANNELS,
    Stack,
    Structure,
    Weight,
    dim_of,
    linear,
    sparse_ffn,
    vector,
)
from d2m.family import check_adaln
from d2m.family_pixart import PIXART, check_conditions
from d2m.recipe import SparseSpec

LIST = "transformer_blocks"


def anatomy(config: Mapping[str, Any], structure: Structure, image: int, text: int) -> list[Stack]:
    """As `d2m.anatomy.anatomy`. ValueError for a mode of modulation that it cannot have."""
    check_conditions(config)
    check_adaln(PIXART, structure.adaln.mode)
    dim, depth = dim_of(config), int(config["num_layers"])
    stacks = [Stack("", 1, 1, tuple(_embedders(config, dim, image, text)))]
    specs = [structure.spec.at("double", i) if structure.spec else None for i in range(depth)]
    for spec in dict.fromkeys(specs):
        weights = tuple(_block(config, spec, dim, image, text))
        stacks.append(Stack(f"{LIST}.*.", specs.count(spec), specs.count(spec), weights))
    return [*stacks, Stack("", 1, 1, tuple(_output(config, dim, image)))]


def _embedders(config: Mapping[str, Any], dim: int, image: int, text: int) -> Iterator[Weight]:
    patch = config["patch_size"] ** 2 * config["in_channels"]
    yield from linear("embedders", "pos_embed.proj", patch, dim, image)
    time = "adaln_single.emb.timestep_embedder"
    yield from linear("embedders", f"{time}.linear_1", TIME_CHANNELS, dim, 1)
    yield from linear("embedders", f"{time}.linear_2", dim, dim, 1)
    caption = config["caption_channels"]
    yield from linear("embedders", "caption_projection.linear_1", caption, dim, text)
    yield from linear("embedders", "caption_projection.linear_2", dim, dim, text)
    yield from linear("adaln", "adaln_single.linear", dim, 6 * dim, 1)


def _block(
    config: Mapping[str, Any], spec: SparseSpec | None, dim: int, image: int, text: int
) -> Iterator[Weight]:
    part, cross = "double_attention", config["cross_attention_dim"]
    yield vector("adaln", "scale_shift_table", 6 * dim)
    for name, width, rows in (("attn1", dim, image), ("attn2", cross, text)):
        yield from linear(part, f"{name}.to_q", dim, dim, image)
        yield from linear(part, f"{name}.to_k", width, dim, rows)
        yield from linear(part, f"{name}.to_v", width, dim, rows)
        yield from linear(part, f"{name}.to_out.0", dim, dim, image)
        yield Weight(part, name, 0, 0, 4 * image * rows * dim)
    if spec is None:
        hidden = PIXART.ratio * dim
        yield from linear("double_ffn", "ff.net.0.proj", dim, hidden, image)
        yield from linear("double_ffn", "ff.net.2", hidden, dim, image)
    else:
        yield from sparse_ffn("double_ffn", "ff", dim, spec, image)


def _output(config: Mapping[str, Any], dim: int, image: int) -> Iterator[Weight]:
    channels = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
    yield vector("output", "scale_shift_table", 2 * dim)
    yield from linear("output", "proj_out", dim, channels, image)
