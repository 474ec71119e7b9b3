"""An FFN's place in a block, and what kind of FFN it is: names, for whoever replaces it.

Letters: D width, N hidden neurons of the dense FFN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# What an FFN does between its two matrices; `d2m.model.routing.activate` computes them.
ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "swiglu", "geglu")
# Those that multiply two up-projections: silu(gate) * value, gelu(gate) * value.
GATED = ("swiglu", "geglu")


def up_rows(activation: str) -> int:
    """Rows of the up-projection that one hidden neuron has: 2 (gate and value) or 1."""
    return 2 if activation in GATED else 1


@dataclass(frozen=True)
class Site:
    """One FFN of a block type. Paths are relative to the block.

    blocks: the model's list of such blocks; module: where the SparseFFN goes; fc1, fc2: the dense
    Linears; stream: whose tokens pass, "image", "text" or "both". activation: one of ACTIVATIONS.
    Whether the FFN has biases is its Linears' own matter.

    gate: of a gated FFN whose gates have a Linear of their own; fc1 is that of the values then.
    Without it fc1 has both, the gates' N rows first.
    rest: set where fc2 also maps something else: its columns before the FFN's go to this Linear
    (without bias) and fc2 is replaced by AttentionPlusFFN; identity: an activation that SparseFFN
    contains already.
    before: set where fc1 also maps something else: its rows before the FFN's, q, k and v, three
    times as many as the columns that `rest` has, go to this Linear, and fc1 is replaced by
    ProjectionBesideFFN, in which both lie.
    answers_width(block, D): tells the block that its FFN's part of fc1 answers D numbers now.
    """

    blocks: str
    module: str
    fc1: str
    fc2: str
    stream: str
    rest: str | None = None
    identity: str | None = None
    activation: str = "gelu_tanh"
    gate: str | None = None
    before: str | None = None
    answers_width: Callable[[nn.Module, int], None] = lambda block, dim: None

    @property
    def linears(self) -> tuple[str, ...]:
        """The dense Linears that become the SparseFFN."""
        return (self.fc1, *([self.gate] if self.gate else []), self.fc2)


def feed_forward(blocks: str, module: str, stream: str) -> Site:
    """The site of diffusers' FeedForward, which all families have in their double blocks."""
    return Site(blocks, module, f"{module}.net.0.proj", f"{module}.net.2", stream)


def joint_output(blocks: str) -> Site:
    """The FFN of FLUX.1's single blocks: `proj_out` maps from attention and FFN together."""
    up, down = "proj_mlp", "proj_out"
    return Site(blocks, up, up, down, "both", rest=f"{down}.linear", identity="act_mlp")


def separate_gated(
    blocks: str, module: str, linears: tuple[str, str, str], stream: str, activation: str = "swiglu"
) -> Site:
    """A gated FFN of three Linears, named in the order gate, value, down (Z-Image: w1, w3, w2)."""
    gate, value, down = (f"{module}.{name}" for name in linears)
    return Site(blocks, module, value, down, stream, activation=activation, gate=gate)


def fused_gated(
    blocks: str, module: str, linears: tuple[str, str], stream: str, activation: str = "swiglu"
) -> Site:
    """A gated FFN of two Linears, the first with the gates' rows before the values' (FLUX.2)."""
    up, down = (f"{module}.{name}" for name in linears)
    return Site(blocks, module, up, down, stream, activation=activation)


def beside_attention(blocks: str, attention: str, stream: str) -> Site:
    """The gated FFN of FLUX.2's single blocks, whose attention holds it.

    `to_qkv_mlp_proj` maps to q, k, v, gates and values, `to_out` from attention and FFN. The
    processor reads the sizes of both from the attention, and calls `mlp_act_fn` (read).
    """

    def answers_width(block: nn.Module, dim: int) -> None:
        own = block.get_submodule(attention)
        own.mlp_hidden_dim, own.mlp_mult_factor = dim, 1  # type: ignore[assignment]

    first = f"{attention}.to_qkv_mlp_proj"
    return Site(
        blocks,
        f"{first}.ffn",
        first,
        f"{attention}.to_out",
        stream,
        rest=f"{attention}.to_out.linear",
        identity=f"{attention}.mlp_act_fn",
        activation="swiglu",
        before=f"{first}.linear",
        answers_width=answers_width,
    )
