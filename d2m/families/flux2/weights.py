"""The weights of a FLUX.2 transformer by name: every one's size, and its use in a step.

Put together from the pieces of d2m/families/weights.py. No Linear has a bias; all double blocks
share their modulation, and all single ones theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from d2m.families import weights as shared
from d2m.families.weights import TIME_CHANNELS, Stack, Structure, Weight
from d2m.recipe.recipe import SparseSpec

LISTS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
FFN = ("linear_in", "linear_out")
RATIO = 3.0  # read: hidden neurons of an FFN over its width, where a config does not say
# Of the model: vectors of D that a block takes.
MODULATIONS = {
    "double_stream_modulation_img": 6,
    "double_stream_modulation_txt": 6,
    "single_stream_modulation": 3,
}


def hidden_of(config: Mapping[str, Any]) -> int:
    """Hidden neurons of an FFN."""
    return int(shared.dim_of(config) * (config.get("mlp_ratio") or RATIO))


def weights(config: Mapping[str, Any], structure: Structure, image: int, text: int) -> list[Stack]:
    """See d2m.families.weights."""
    dim, hidden = shared.dim_of(config), hidden_of(config)
    depth = {"double": config["num_layers"], "single": config["num_single_layers"]}
    blocks, spec = structure.blocks, structure.spec
    first = (*_embedders(config, dim, image, text), *_modulations(dim))
    stacks = [Stack("", 1, 1, first)]
    for kind, name in LISTS.items():
        for own, count, running in shared.alike(blocks, spec, kind, depth[kind]):
            if kind == "double":
                inside = tuple(_double(config, own, dim, hidden, image, text))
            else:
                inside = tuple(_single(config, own, dim, hidden, image + text))
            stacks.append(Stack(f"{name}.*.", count, running, inside))
        stacks += shared.routers(name, kind, dim, blocks)
    return [*stacks, Stack("", 1, 1, tuple(_output(config, dim, image)))]


def plain(part: str, name: str, inputs: int, outputs: int, rows: int) -> Iterator[Weight]:
    """A Linear without a bias."""
    return shared.linear(part, name, inputs, outputs, rows, bias=False)


def _embedders(config: Mapping[str, Any], dim: int, image: int, text: int) -> Iterator[Weight]:
    embedders = ["timestep_embedder"]
    if config.get("guidance_embeds") is not False:
        embedders.append("guidance_embedder")
    for name in embedders:
        for last, width in (("linear_1", TIME_CHANNELS), ("linear_2", dim)):
            yield from plain("embedders", f"time_guidance_embed.{name}.{last}", width, dim, 1)
    yield from plain("embedders", "x_embedder", config["in_channels"], dim, image)
    yield from plain("embedders", "context_embedder", config["joint_attention_dim"], dim, text)


def _modulations(dim: int) -> Iterator[Weight]:
    for name, chunks in MODULATIONS.items():
        yield from plain("adaln", f"{name}.linear", dim, chunks * dim, 1)


def _double(
    config: Mapping[str, Any], spec: SparseSpec | None, dim: int, hidden: int, image: int, text: int
) -> Iterator[Weight]:
    part, head = "double_attention", config["attention_head_dim"]
    for rows, linears, norms, ffn in (
        (image, ("to_q", "to_k", "to_v", "to_out.0"), ("norm_q", "norm_k"), "ff"),
        (
            text,
            ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            ("norm_added_q", "norm_added_k"),
            "ff_context",
        ),
    ):
        for name in linears:
            yield from plain(part, f"attn.{name}", dim, dim, rows)
        for name in norms:
            yield shared.vector(part, f"attn.{name}.weight", head)
        yield from shared.gated_ffn("double_ffn", ffn, FFN, dim, hidden, spec, rows)
    yield Weight(part, "attn", 0, 0, 4 * (image + text) ** 2 * dim)


def _single(
    config: Mapping[str, Any], spec: SparseSpec | None, dim: int, hidden: int, rows: int
) -> Iterator[Weight]:
    part, head = "single_attention", config["attention_head_dim"]
    for name in ("norm_q", "norm_k"):
        yield shared.vector(part, f"attn.{name}.weight", head)
    yield Weight(part, "attn", 0, 0, 4 * rows**2 * dim)
    first, last = "attn.to_qkv_mlp_proj", "attn.to_out"
    if spec is not None:
        yield from plain(part, f"{first}.linear", dim, 3 * dim, rows)
        yield from plain(part, f"{last}.linear", dim, dim, rows)
        yield from shared.sparse_ffn(
            "single_ffn", f"{first}.ffn", dim, hidden, spec, rows, "swiglu", bias=False
        )
        return
    # Attention and FFN have their Linears in common: each weight is counted in two parts.
    yield from plain(part, first, dim, 3 * dim, rows)
    yield from plain(part, last, dim, dim, rows)
    yield from plain("single_ffn", first, dim, 2 * hidden, rows)
    yield from plain("single_ffn", last, hidden, dim, rows)


def _output(config: Mapping[str, Any], dim: int, image: int) -> Iterator[Weight]:
    channels = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
    yield from plain("output", "norm_out.linear", dim, 2 * dim, 1)
    yield from plain("output", "proj_out", dim, channels, image)
