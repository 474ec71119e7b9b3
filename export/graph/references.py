"""Keys and values of reference tokens, kept from step to step (FLUX.2 [klein] KV).

There reference tokens attend to themselves alone and are modulated as at the end of denoising, so
what other tokens need of them is the same in every step. A program of their own runs once, with
the transformer's weights, and writes STATES: for every block its keys, rotated, and its values,
side by side. The transformer's blocks read them, each the row that its weight VECTORS names.

Shape letters: B batch, R reference tokens, N blocks, H heads, C channels of a head, D = H C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from export.graph.attention import attended, heads, rms_norm, rotate
from export.graph.blocks import Types, call_by_name
from export.graph.program import Program
from export.graph.routers import placed_blocks
from export.graph.trace import VECTORS, Spec
from runtime.families.flux2 import STATES

ROPE = ("rope_cos", "rope_sin")
LISTS = ("transformer_blocks", "single_transformer_blocks")


def number(model: Any) -> None:
    """Every block knows which row of STATES is its own, and takes it of all that it is called with.

    ValueError for a model with groups, whose blocks a step may leave out.
    """

    def choose(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kept = given["joint_attention_kwargs"][STATES]
        own = kept[:, getattr(module, VECTORS).long()].flatten(1, 2)
        return args, given | {"joint_attention_kwargs": {STATES: own}}

    for index, (_, block, group) in enumerate(blocks_of(model)):
        if group is not None:
            raise ValueError(
                "the transformer keeps keys and values of reference images and has groups of"
                " blocks, expected none; convert without groups."
            )
        own = nn.Parameter(torch.tensor([float(index)]), requires_grad=False)
        block.register_parameter(VECTORS, own)
        block.register_forward_pre_hook(choose, with_kwargs=True)


def blocks_of(model: Any) -> list[tuple[str, Any, str | None]]:
    """(weight prefix, block, its group) of all blocks in their order."""
    return [each for name in LISTS for each in placed_blocks(model, name)]


def states_spec(model: Any, dtype: torch.dtype, tokens: str) -> Spec:
    """STATES [B, N, R, 2 D]; `tokens`: what R is called."""
    return Spec(dtype, ("batch", len(blocks_of(model)), tokens, 2 * model.inner_dim))


class Embed(nn.Module):
    """What the model does with reference tokens before its blocks; STATES begin as zeros."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.x_embedder = model.x_embedder
        self.time_guidance_embed = model.time_guidance_embed
        self.double_stream_modulation_img = model.double_stream_modulation_img
        self.single_stream_modulation = model.single_stream_modulation
        self.count = len(blocks_of(model))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        """-> tokens [B, R, D], modulations of double and of single blocks, STATES."""
        tokens = self.x_embedder(hidden_states)
        temb = self.time_guidance_embed(timestep.to(tokens.dtype) * 1000, None)
        zeros = torch.zeros_like(torch.cat([tokens, tokens], dim=-1))
        states = zeros[:, None].expand(-1, self.count, -1, -1)
        modulations = self.double_stream_modulation_img(temb), self.single_stream_modulation(temb)
        return tokens, *modulations, states


class Double(nn.Module):
    """The image's half of a double block, on reference tokens alone."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.ff = block.norm1, block.norm2, block.ff
        self.attn = nn.Module()  # without the text's half, whose weights are not read
        for name in ("to_qkv", "norm_q", "norm_k", "to_out"):
            setattr(self.attn, name, getattr(block.attn, name))
        self.size = block.attn.head_dim
        self.register_parameter(VECTORS, getattr(block, VECTORS))

    def forward(
        self, hidden_states: Tensor, modulation_image: Tensor, rope_cos: Tensor, rope_sin: Tensor,
        references: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """[B, R, D] -> [B, R, D], STATES with the block's row."""
        attn: Any = self.attn
        parts = modulation_image[:, None].chunk(6, dim=-1)
        normal = (1 + parts[1]) * self.norm1(hidden_states) + parts[0]
        query, key, value = heads(attn.to_qkv(normal), self.size)
        query, key = rms_norm(query, attn.norm_q), rms_norm(key, attn.norm_k)
        query, key = rotate(query, rope_cos, rope_sin), rotate(key, rope_cos, rope_sin)
        hidden_states = hidden_states + parts[2] * attn.to_out[0](attended(query, key, value))
        normal = self.norm2(hidden_states) * (1 + parts[4]) + parts[3]
        hidden_states = hidden_states + parts[5] * self.ff(normal)
        return hidden_states, with_row(references, key, value, getattr(self, VECTORS))


class Single(nn.Module):
    """A single block on reference tokens alone; its processor says what they were."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.attn = block.norm, block.attn
        self.register_parameter(VECTORS, getattr(block, VECTORS))

    def forward(
        self, hidden_states: Tensor, modulation_single: Tensor, rope_cos: Tensor, rope_sin: Tensor,
        references: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """[B, R, D] -> [B, R, D], STATES with the block's row."""
        shift, scale, gate = modulation_single[:, None].chunk(3, dim=-1)
        normal = (1 + scale) * self.norm(hidden_states) + shift
        kept: list[Tensor] = []
        output = self.attn(normal, image_rotary_emb=(rope_cos, rope_sin), kept=kept)
        return (
            hidden_states + gate * output,
            with_row(references, kept[0], kept[1], getattr(self, VECTORS)),
        )


def with_row(states: Tensor, key: Tensor, value: Tensor, place: Tensor) -> Tensor:
    """STATES with keys and values [B, H, R, C] in the row `place` [1]."""
    row = torch.cat([each.transpose(1, 2).flatten(2) for each in (key, value)], dim=-1)
    numbers = torch.arange(states.shape[1], dtype=torch.float32)
    return torch.where((numbers == place)[None, :, None, None], row[:, None], states)


def reference_program(model: Any, dtype: torch.dtype, top_k: Sequence[int]) -> Program:
    """The program of STATES for a prepared transformer whose blocks are numbered."""
    width, tokens = model.inner_dim, ("batch", "image_tokens")
    rotary = Spec(torch.float32, ("image_tokens", model.config.attention_head_dim))
    inputs = {
        "hidden_states": Spec(dtype, (*tokens, model.config.in_channels)),
        "timestep": Spec(torch.float32, ("batch",)),
    }
    tables = dict.fromkeys(ROPE, rotary)
    inner = {
        "hidden_states": Spec(dtype, (*tokens, width)),
        "modulation_image": Spec(dtype, ("batch", 6 * width)),
        "modulation_single": Spec(dtype, ("batch", 3 * width)),
        STATES: states_spec(model, dtype, "image_tokens"),
    }
    types = Types(dtype, top_k)
    calls: list[tuple[str, str]] = []

    def call(
        stem: str, prefix: str, module: nn.Module, read: Mapping[str, Spec], written: Sequence[str]
    ) -> None:
        outputs = {name: inner[name] for name in written}
        calls.append((types.of(stem, module, call_by_name, read, outputs), prefix))

    call("embed", "", Embed(model), inputs, list(inner))
    for prefix, block, _ in blocks_of(model):
        double = prefix.startswith("transformer_blocks.")
        modulation = "modulation_image" if double else "modulation_single"
        read = {name: inner[name] for name in ("hidden_states", modulation)} | tables
        read[STATES] = inner[STATES]
        module = Double(block) if double else Single(block)
        call("double" if double else "single", prefix, module, read, ("hidden_states", STATES))
    return Program(types.known, calls, inputs | tables, {STATES: inner[STATES]})
