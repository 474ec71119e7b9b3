"""What a family of models is to export: how its transformer is cut into blocks, its other parts.

A row stands in a file of its own, `export/family_NAME.py`, with the functions it names
(docs/adding-a-family.md). Names of tensors are those of a program's environment (export/blocks.py);
`hidden_states` and `temb` are among them in every family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from export.blocks import Program
    from export.trace import Spec

    Environment = tuple[dict[str, Spec], dict[str, Spec], dict[str, Spec]]


@dataclass(frozen=True)
class Row:
    """How a block is called: its type's name, and `call(run, tensors) -> outputs`."""

    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    call: Callable[[Callable[..., Any], dict[str, Tensor]], Any]


@dataclass(frozen=True)
class Part:
    """A component beside the transformer.

    name: in the bundle; folder: of the pipeline; library, cls: where its class comes from; program:
    (model, dtype) -> its Program; whole: loaded at once, else its weights are read one by one;
    stored: a parameter's name in the model -> in its files.
    picked: what the model returns -> the tensors that are the Program's outputs, in their order;
    before: keywords of the model's call which are outputs too, ahead of those.
    """

    name: str
    folder: str
    library: str
    cls: str
    program: Callable[[Any, torch.dtype], Program]
    picked: Callable[[Any], tuple[Tensor, ...]]
    whole: bool = True
    before: tuple[str, ...] = ()
    stored: Callable[[str], str] = lambda name: name


def check_packed(transformer: Mapping[str, Any], channels: int, directory: Path) -> None:
    """ValueError unless a token of the transformer is 2 x 2 latents of the VAE's `channels`."""
    if transformer.get("in_channels") != 4 * channels:
        raise ValueError(
            f"{directory} has a transformer of {transformer.get('in_channels')} input channels and"
            f" a VAE of {channels}, expected four times as many (2 x 2 latents a token); the"
            " components are of different models."
        )


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """What the pipeline's VAE makes of latents [n, C, h, w]: pixels [n, 3, H, W]."""
    pixels: Tensor = pipe.vae.decode(latents, return_dict=False)[0]
    return pixels


@dataclass(frozen=True)
class Family:
    """A row of export/families.py.

    name: as d2m.families and manifests have it; parts: in the order in which a picture needs them,
    None being the transformer's place; scheduler: diffusers' class.
    environment(model, dtype): the component's inputs, the tensors between blocks, its outputs.
    embed(model), final(model): modules of what is before and after the blocks, parameters under the
        model's names. `embed` reads the inputs named in `opens`, or all that are not in `inner`;
        `final` reads `closes`.
    row(block): how a block is called. `temb` among its inputs becomes `modulation` where a model
        has shared modulation, unless the row names that too.
    prepare(model): what else is changed, in place, in a model that is about to be traced.
    processor(): the attention processor that blocks are traced with.
    lengths(directory): tokenizer -> tokens that every prompt is padded and cut to.
    latents(configs of transformer and vae, directory): the manifest's `latents`; ValueError where
        the components are of different models.
    text_tokens(lengths): component -> tokens that it reads, for the plans' profiles.

    For torch's side of `d2m parity` (export/reference.py):
    draw(pipe, conditions, negative, latents, **settings): the pipeline called as users call it,
        -> its last latents; `negative` is None where nothing is guided by one.
    block_inputs(keywords of a block): the tensors of the environment that it reads.
    model_inputs(model, keywords of its forward, the first block's inputs): the component's inputs.
    sample(model, its output): the component's output.
    beside(model, keywords of its forward): tensors of the environment that no block reads.
    spatial(pipe, latents, height, width): [n, C, h, w] as the VAE decodes them.
    decode(pipe, latents of that shape): pixels [n, 3, H, W], -1 to 1.
    """

    name: str
    parts: tuple[Part | None, ...]
    environment: Callable[[Any, torch.dtype], Environment]
    embed: Callable[[Any], nn.Module]
    final: Callable[[Any], nn.Module]
    row: Callable[[nn.Module], Row]
    processor: Callable[[], Any]
    lengths: Callable[[Path], dict[str, int]]
    latents: Callable[[Mapping[str, Any], Mapping[str, Any], Path], dict[str, Any]]
    text_tokens: Callable[[Mapping[str, int]], dict[str, int]]
    draw: Callable[..., Tensor]
    block_inputs: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    model_inputs: Callable[[Any, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    sample: Callable[[Any, Tensor], Tensor]
    spatial: Callable[[Any, Tensor, int, int], Tensor]
    decode: Callable[[Any, Tensor], Tensor] = decoded
    prepare: Callable[[Any], None] = lambda model: None
    beside: Callable[[Any, Mapping[str, Any]], dict[str, Tensor]] = lambda model, given: {}
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    closes: tuple[str, ...] = ("hidden_states", "temb")
