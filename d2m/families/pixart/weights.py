"""The weights of PixArt-Sigma's transformer by name: every one's size, and its use in a step.

Put together from the pieces of d2m/families/weights.py. All blocks are alike: attention of the
image's tokens, attention of these to the text's, one FFN, and a table [6, D] that is added to the
modulation which all share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from d2m.families import weights as shared
from d2m.families.weights import TIME_CHANNELS, Stack, Structure, Weight
from d2m.recipe.recipe import SparseSpec

LIST = "transformer_blocks"
RATIO = 4  # hidden neurons of an FFN over its width


def check_conditions(config: Mapping[str, Any]) -> None:
    """ValueError for PixArt-Alpha's conditions on the image's size, which Sigma has not.

    (Read: a config that does not say has them at sample_size 128.)
    """
    conditions = config.get("use_additional_conditions")
    if conditions or (conditions is None and config.get("sample_size", 128) == 128):
        raise ValueError(
            f"the transformer has use_additional_conditions {conditions!r} at sample_size"
            f" {config.get('sample_size', 128)}, expected false: PixArt-Sigma's has no input for"
            " the image's size, and d2m does not know PixArt-Alpha; give PixArt-Sigma's config."
        )


def weights(config: Mapping[str, Any], structure: Structure, image: int, text: int) -> list[Stack]:
    """See d2m.families.weights."""
    check_conditions(config)
    dim, depth = shared.dim_of(config), int(config["num_layers"])
    stacks = [Stack("", 1, 1, tuple(_embedders(config, dim, image, text)))]
    specs = [structure.spec.at("double", i) if structure.spec else None for i in range(depth)]
    for spec in dict.fromkeys(specs):
        inside_block = tuple(_block(config, spec, dim, image, text))
        stacks.append(Stack(f"{LIST}.*.", specs.count(spec), specs.count(spec), inside_block))
    return [*stacks, Stack("", 1, 1, tuple(_output(config, dim, image)))]


def _embedders(config: Mapping[str, Any], dim: int, image: int, text: int) -> Iterator[Weight]:
    patch = config["patch_size"] ** 2 * config["in_channels"]
    yield from shared.linear("embedders", "pos_embed.proj", patch, dim, image)
    time = "adaln_single.emb.timestep_embedder"
    yield from shared.linear("embedders", f"{time}.linear_1", TIME_CHANNELS, dim, 1)
    yield from shared.linear("embedders", f"{time}.linear_2", dim, dim, 1)
    caption = config["caption_channels"]
    yield from shared.linear("embedders", "caption_projection.linear_1", caption, dim, text)
    yield from shared.linear("embedders", "caption_projection.linear_2", dim, dim, text)
    yield from shared.linear("adaln", "adaln_single.linear", dim, 6 * dim, 1)


def _block(
    config: Mapping[str, Any], spec: SparseSpec | None, dim: int, image: int, text: int
) -> Iterator[Weight]:
    part, cross = "double_attention", config["cross_attention_dim"]
    yield shared.vector("adaln", "scale_shift_table", 6 * dim)
    for name, width, rows in (("attn1", dim, image), ("attn2", cross, text)):
        yield from shared.linear(part, f"{name}.to_q", dim, dim, image)
        yield from shared.linear(part, f"{name}.to_k", width, dim, rows)
        yield from shared.linear(part, f"{name}.to_v", width, dim, rows)
        yield from shared.linear(part, f"{name}.to_out.0", dim, dim, image)
        yield Weight(part, name, 0, 0, 4 * image * rows * dim)
    yield from shared.ffn("ff", dim, RATIO * dim, spec, image)


def _output(config: Mapping[str, Any], dim: int, image: int) -> Iterator[Weight]:
    channels = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
    yield shared.vector("output", "scale_shift_table", 2 * dim)
    yield from shared.linear("output", "proj_out", dim, channels, image)
