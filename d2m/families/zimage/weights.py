"""The weights of a Z-Image transformer by name: every one's size, and its use in a step.

Put together from the pieces of d2m/families/weights.py. Image and text are each filled up to whole
multiples of 32 tokens, which are computed like any others (read).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from d2m.families import weights as shared
from d2m.families.weights import TIME_CHANNELS, Stack, Structure, Weight
from d2m.recipe.recipe import SparseSpec

LIST = "layers"
PATCH = 2  # read: the patch that all published models have
MULTIPLE = 32  # read: of tokens, of image and text each
TIME_HIDDEN, EMBEDDING = 1024, 256  # read: of the time; the embedding is no wider than the model


def hidden_of(config: Mapping[str, Any]) -> int:
    """Hidden neurons of an FFN: 8/3 of the width, as diffusers rounds it."""
    return int(config["dim"] / 3 * 8)


def temb_width(dim: int) -> int:
    """Numbers of the embedding that feeds modulation."""
    return min(dim, EMBEDDING)


def filled(tokens: int) -> int:
    """Tokens with those that fill them up to a whole multiple."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def weights(config: Mapping[str, Any], structure: Structure, image: int, text: int) -> list[Stack]:
    """See d2m.families.weights."""
    image, text = filled(image), filled(text)
    refiners = int(config["n_refiner_layers"])
    stacks = [Stack("", 1, 1, tuple(_embedders(config, image, text)))]
    for name, rows, modulated in (("noise", image, True), ("context", text, False)):
        inside = tuple(_block(config, None, rows, modulated))
        stacks.append(Stack(f"{name}_refiner.*.", refiners, refiners, inside))
    depth = int(config["n_layers"])
    for own, count, running in shared.alike(structure.blocks, structure.spec, "double", depth):
        inside = tuple(_block(config, own, image + text, True))
        stacks.append(Stack(f"{LIST}.*.", count, running, inside))
    dim = int(config["dim"])
    stacks += shared.routers(LIST, "double", dim, structure.blocks, temb_width(dim))
    return [*stacks, Stack("", 1, 1, tuple(_output(config, image + text)))]


def _embedders(config: Mapping[str, Any], image: int, text: int) -> Iterator[Weight]:
    part, dim, caption = "embedders", int(config["dim"]), int(config["cap_feat_dim"])
    patch = PATCH**2 * int(config["in_channels"])
    yield from shared.linear(part, f"all_x_embedder.{PATCH}-1", patch, dim, image)
    yield from shared.linear(part, "t_embedder.mlp.0", TIME_CHANNELS, TIME_HIDDEN, 1)
    yield from shared.linear(part, "t_embedder.mlp.2", TIME_HIDDEN, temb_width(dim), 1)
    yield shared.vector(part, "cap_embedder.0.weight", caption)
    yield from shared.linear(part, "cap_embedder.1", caption, dim, text)
    for name in ("x_pad_token", "cap_pad_token"):
        yield shared.vector(part, name, dim)


def _block(
    config: Mapping[str, Any], spec: SparseSpec | None, rows: int, modulated: bool
) -> Iterator[Weight]:
    part, dim = "double_attention", int(config["dim"])
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from shared.linear(part, f"attention.{name}", dim, dim, rows, bias=False)
    for name in ("norm_q", "norm_k"):
        yield shared.vector(part, f"attention.{name}.weight", dim // int(config["n_heads"]))
    yield Weight(part, "attention", 0, 0, 4 * rows**2 * dim)
    for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield shared.vector(part, f"{name}.weight", dim)
    linears = ("w1", "w3", "w2")
    neurons = hidden_of(config)
    yield from shared.gated_ffn("double_ffn", "feed_forward", linears, dim, neurons, spec, rows)
    if modulated:
        yield from shared.linear("adaln", "adaLN_modulation.0", temb_width(dim), 4 * dim, 1)


def _output(config: Mapping[str, Any], rows: int) -> Iterator[Weight]:
    dim, name = int(config["dim"]), f"all_final_layer.{PATCH}-1"
    channels = PATCH**2 * int(config["in_channels"])
    yield from shared.linear("output", f"{name}.linear", dim, channels, rows)
    yield from shared.linear("output", f"{name}.adaLN_modulation.1", temb_width(dim), dim, 1)
