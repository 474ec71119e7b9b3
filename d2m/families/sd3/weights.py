"""The weights of a Stable Diffusion 3 transformer by name: every one's size, its use in a step.

Put together from the pieces of d2m/families/weights.py. Blocks differ: those named in
`dual_attention_layers` have a second attention of the image alone, the last one writes no text.
Of a group of unlike blocks those are counted as running that come last in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from d2m.families import weights as shared
from d2m.families.weights import TIME_CHANNELS, Stack, Structure, Weight
from d2m.recipe.recipe import SparseSpec
from d2m.recipe.structure import lowrank_default

LIST = "transformer_blocks"
RATIO = 4  # hidden neurons of an FFN over its width
Kind = tuple[SparseSpec | None, bool, bool]  # FFNs, second attention, last


def weights(config: Mapping[str, Any], structure: Structure, image: int, text: int) -> list[Stack]:
    """See d2m.families.weights; text: tokens of the CLIPs and of T5 together."""
    dim, depth, blocks = shared.dim_of(config), int(config["num_layers"]), structure.blocks
    dual = set(config.get("dual_attention_layers") or ())
    spec = structure.spec
    kinds: dict[int, Kind] = {
        i: (spec.at("double", i) if spec else None, i in dual, i == depth - 1)
        for i in range(depth)
        if i not in blocks.dropped("double")
    }
    chunks = [number for kind in kinds.values() for _, number in norms_of(kind)]
    rank = structure.adaln.rank or min(dim, lowrank_default(dim, sum(chunks)))
    common = shared.modulation(structure.adaln, dim, rank, max(chunks, default=6))
    stacks = [Stack("", 1, 1, (*_embedders(config, dim, image, text), *common))]
    skipped = {i for group in blocks.groups("double") for i in group[: len(group) - blocks.kappa]}
    for kind in dict.fromkeys(kinds.values()):
        indices = [i for i in kinds if kinds[i] == kind]
        inside_block = (
            *_block(config, kind, dim, image, text),
            *shared.modulated(structure.adaln, norms_of(kind), dim, rank),
        )
        running = sum(i not in skipped for i in indices)
        stacks.append(Stack(f"{LIST}.*.", len(indices), running, inside_block, tuple(indices)))
    stacks += shared.routers(LIST, "double", dim, blocks)
    return [*stacks, Stack("", 1, 1, tuple(shared.output(config, dim, image)))]


def norms_of(kind: Kind) -> tuple[tuple[str, int], ...]:
    """(name, chunks of width D) of a block's modulated norms; the last block's text norm is not."""
    _, dual, last = kind
    image = ("norm1", 9 if dual else 6)
    return (image,) if last else (image, ("norm1_context", 6))


def _embedders(config: Mapping[str, Any], dim: int, image: int, text: int) -> Iterator[Weight]:
    patch = config["patch_size"] ** 2 * config["in_channels"]
    yield from shared.linear("embedders", "pos_embed.proj", patch, dim, image)
    table = 4 * config["pos_embed_max_size"] ** 2 * dim
    yield Weight("embedders", "pos_embed.pos_embed", 0, 0, buffer=table)
    embeds = {"timestep_embedder": TIME_CHANNELS, "text_embedder": config["pooled_projection_dim"]}
    for name, inputs in embeds.items():
        for last, width in (("linear_1", inputs), ("linear_2", dim)):
            yield from shared.linear("embedders", f"time_text_embed.{name}.{last}", width, dim, 1)
    wide = config["caption_projection_dim"]
    joint = config["joint_attention_dim"]
    yield from shared.linear("embedders", "context_embedder", joint, wide, text)


def _block(
    config: Mapping[str, Any], kind: Kind, dim: int, image: int, text: int
) -> Iterator[Weight]:
    spec, dual, last = kind
    part, normed = "double_attention", bool(config.get("qk_norm"))
    own = ("to_q", "to_k", "to_v", "to_out.0")
    added = ("add_q_proj", "add_k_proj", "add_v_proj", *(() if last else ("to_add_out",)))
    linears = [("attn", own, image), ("attn", added, text)]
    norms = [("attn", name) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    if dual:
        linears.append(("attn2", own, image))
        norms += [("attn2", name) for name in ("norm_q", "norm_k")]
        yield Weight(part, "attn2", 0, 0, 4 * image**2 * dim)
    yield Weight(part, "attn", 0, 0, 4 * (image + text) ** 2 * dim)
    for module, names, rows in linears:
        for name in names:
            yield from shared.linear(part, f"{module}.{name}", dim, dim, rows)
    for module, name in norms if normed else ():
        yield shared.vector(part, f"{module}.{name}.weight", config["attention_head_dim"])
    if last:  # AdaLayerNormContinuous, which no mode of modulation shares
        yield from shared.linear("adaln", "norm1_context.linear", dim, 2 * dim, 1)
    for name, rows in (("ff", image), *(() if last else (("ff_context", text),))):
        yield from shared.ffn(name, dim, RATIO * dim, spec, rows)
