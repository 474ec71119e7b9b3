"""What a family of models is to export: how its transformer is cut into blocks, its other parts.

A row stands in a file of its own, `export/families/NAME.py`, with the functions it names
(docs/families.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.families.ends import decode, encode
from export.graph.program import Program, Tracing

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Encoder:
    """A component other than the transformer: a text encoder, or a half of the VAE.

    name: in the bundle; folder: of the pipeline; library, cls: where its class comes from; others:
    classes that it may be of too; program: (model, dtype) -> its Program; whole: loaded at once,
    else its weights are read one by one; stored_name: a parameter's name in the model -> in its
    files, where those do not have the model's own.
    outputs_of: (the model, what it returns) -> the tensors that are the Program's outputs, in their
    order; passed_inputs: keywords of the model's call which are outputs too, ahead of those;
    read: keywords of its call that are the Program's inputs, under these names.
    """

    name: str
    folder: str
    library: str
    cls: str
    program: Callable[[Any, torch.dtype], Program]
    outputs_of: Callable[[Any, Any], tuple[Tensor, ...]]
    whole: bool = True
    passed_inputs: tuple[str, ...] = ()
    stored_name: Callable[[str], str] = lambda name: name
    others: tuple[str, ...] = ()
    read: tuple[str, ...] = ("input_ids",)


def apart(kwargs: dict[str, Any], output: Any, text_tokens: int) -> tuple[dict[str, Any], Any]:
    """A block's keywords and what it returns with both streams apart, the text's tokens first.

    FLUX.2's single blocks get and return them in one tensor.
    """
    if kwargs.get("encoder_hidden_states", output) is not None:
        return kwargs, output
    names = ("encoder_hidden_states", "hidden_states")
    split = [text_tokens, kwargs["hidden_states"].shape[1] - text_tokens]
    given = kwargs | dict(zip(names, kwargs["hidden_states"].split(split, dim=1)))
    return given, output.split(split, dim=1)


@dataclass(frozen=True)
class Family:
    """A row of export/families/known.py.

    name: as d2m.families and manifests have it; components: in the order in which an image needs
    them, None being the transformer's place; scheduler: diffusers' class; tracing: how the
    transformer becomes a program.
    lengths(directory): tokenizer -> tokens that every prompt is padded and cut to.
    latents(configs of transformer and vae, directory): the manifest's `latents`; ValueError where
        the components are of different models.
    text_tokens(lengths): component -> tokens that it reads, for the plans' profiles.
    tokens_record(tokenizer, its length, its pipeline's index): what a tokenizer's record in the
        manifest has beside its file and length, such as a chat template around every prompt.
    guided(model_index.json): whether the pipeline generates with classifier-free guidance; None
        where all of the family's do or none does.

    For torch's side of `d2m parity` (export/parity/torch_recording.py):
    block_inputs(keywords of a block): the tensors of the environment that it reads.
    model_inputs(model, keywords of its forward, the first block's inputs): the component's inputs.
    sample(model, its output): the component's output.
    unread(model, keywords of its forward): tensors of the environment that no block reads.
    told(model, keywords of its forward): tensors of the environment of which a block gets a part.
    through: inputs that `embed` reads and hands on under their names.
    text_tokens_of(keywords of its forward): tokens of the text that its blocks get; apart(keywords
        of a block, what it returns, text tokens): both with image and text apart.
    given(pipe, height, width): keywords of the images that its pipeline wants, if it wants any.
    spatial(pipe, latents, height, width): [n, C, h, w] as the VAE decodes them.
    decode(pipe, latents of that shape): pixels [n, 3, H, W], -1 to 1; encode(pipe, pixels): the
        other way.
    """

    name: str
    components: tuple[Encoder | None, ...]
    tracing: Tracing
    lengths: Callable[[Path], dict[str, int]]
    latents: Callable[[Mapping[str, Any], Mapping[str, Any], Path], dict[str, Any]]
    text_tokens: Callable[[Mapping[str, int]], dict[str, int]]
    block_inputs: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    model_inputs: Callable[[Any, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    spatial: Callable[[Any, Tensor, int, int], Tensor]
    sample: Callable[[Any, Tensor], Tensor] = lambda model, output: output
    decode: Callable[[Any, Tensor], Tensor] = decode
    encode: Callable[[Any, Tensor], Tensor] = encode
    given: Callable[[Any, int, int], dict[str, Any]] = lambda pipe, height, width: {}
    unread: Callable[[Any, Mapping[str, Any]], dict[str, Tensor]] = lambda model, keywords: {}
    told: Callable[[Any, Mapping[str, Any]], dict[str, Tensor]] = lambda model, keywords: {}
    through: tuple[str, ...] = ()
    text_tokens_of: Callable[[Mapping[str, Any]], int] = lambda keywords: keywords[
        "encoder_hidden_states"
    ].shape[1]
    apart: Callable[[dict[str, Any], Any, int], tuple[dict[str, Any], Any]] = apart
    tokens_record: Callable[[Any, int, Mapping[str, Any]], dict[str, Any]] = (
        lambda tokenizer, length, index: {}
    )
    guided: Callable[[Mapping[str, Any]], bool] | None = None
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
