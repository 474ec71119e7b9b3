"""What a family of models is to d2m: a row of names and of plain functions.

A row stands in a file of its own, `d2m/family_NAME.py`, with the functions it names; its model is
not imported before one of them runs. docs/adding-a-family.md shows how one was added.
Letters: B batch, T image tokens, D width. `latents` [B, ...] are of the shape that the family's
transformer takes: FLUX's are packed [B, T, C], SD3's are [B, C, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d2m.beside import Beside

if TYPE_CHECKING:
    from torch import Tensor, nn

    from d2m.anatomy import Stack
    from d2m.structure import Blocks

Config = Mapping[str, Any]
Batch = Mapping[str, "Tensor"]
SOURCES = ("shapes", "pictures", "prompts")


def flow_matching(
    batch: Batch,
    generator: Any,
    mean: float = 1.2,
    std: float = 1.2,
    rows: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`d2m.flow.noisy` of a batch's latents: (x_t, t [B], velocity)."""
    from d2m.flow import noisy

    return noisy(batch["latents"], generator, mean, std, rows)


def grid(rows: int, columns: int, device: Any) -> Tensor:
    """`img_ids` [rows * columns, 3]: every token's row and column, in columns 1 and 2."""
    import torch

    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(-1, 3)


@dataclass(frozen=True)
class Site:
    """One FFN of a block type. Paths are relative to the block.

    blocks: the model's list of such blocks; module: where the SparseFFN goes; fc1, fc2: the dense
    Linears; stream: whose tokens pass, "image", "text" or "both".
    rest: set where fc2 also maps something else: its columns before the FFN's go to this Linear
    (without bias) and fc2 is replaced by AttentionPlusFFN; identity: an activation that SparseFFN
    contains already.
    """

    blocks: str
    module: str
    fc1: str
    fc2: str
    stream: str
    rest: str | None = None
    identity: str | None = None


def halved(vae: Config) -> int:
    """AutoencoderKL's halvings; 3, which all large models have, where a config does not say."""
    levels = vae.get("block_out_channels")
    return len(levels) - 1 if isinstance(levels, list) and levels else 3


@dataclass(frozen=True)
class Family:
    """A row of d2m/families.py. What conversion, planning and data need to know of a model.

    Names:
        name: in manifests and of preset folders; title: for people; pipelines: diffusers' pipeline
        classes; dense_class, sparse_class: of its transformer; ratio: hidden neurons of a dense FFN
        over its width; sites: its FFNs; kinds: (kind as recipes name it, the model's list of such
        blocks), in the order they run; depths: (kind, the config's field with the number of them);
        streams: what a block returns, in its order, the picture's being "image"; sizes: the
        config's fields that decide sizes, with diffusers' defaults; others: fields of other types
        that `anatomy` and `titled` read; beside: folder of a component beside the transformer ->
        its size in published models; tags: of the model card.
    Functions that read configs alone (torch-free):
        titled(config): the title of one model of the family.
        drawing(directory's config reader): what `d2m.draw.drawing_defaults` falls back to.
        anatomy(config, structure, image tokens, text tokens): its weights, for `d2m plan`.
        halvings(the VAE's config): how often it halves a picture's sides.
        check_blocks(blocks, depth): ValueError, in one sentence, for groups that it cannot have.
    Functions of its transformer:
        inputs(model, batch, x, t): keyword inputs of forward; x noisy latents, t [B] in [0, 1].
        embedding(model, batch, t): temb [B, D], which AdaLN and routers read.
        restore(model): what is no part of a state dict, made again after the meta device.
        random_text(config, n, generator): the part of a batch that `embedding` reads, made up.
        noised(batch, generator, mean, std, rows): (x_t, t [B] in [0, 1], what the model is to
            predict), as `d2m.flow.noisy` draws them of a batch's latents.
        predicted(output): what of the model's output is a prediction; the rest teaches nothing.
    Functions of its pipeline:
        text_length(pipe): tokens of the longest text that it is trained with.
        encode_text(pipe, captions, length): conditions of a batch, each [B, ...].
        encode_images(pipe, uint8 [B, H, W, 3]): latents as the transformer takes them.
        places(pipe, batch, height, width): `img_ids` [T, 3] (row and column of every image token
            in columns 1 and 2) and whatever else all samples of a batch share.
        noise(pipe, height, width, generator): one sample's pure noise, [...] as latents.
        trajectory(pipe, text, noise, settings, keep): draw once from noise [1, ...]; `keep` is the
            callback after every step.
        times(scheduler): [steps + 1], the times t of that way's points, from about 1 to 0.
        drawn(pipe, keywords): the pipeline's answer when called with FluxPipeline's keywords.
    aliases: other names that its transformer's class has in configs.
    sources: which of SOURCES it can learn from. text_before: tokens of the transformer's text that
    `max_sequence_length` does not count. unconditional: the share of captions that are left
    empty, for models that are drawn with classifier-free guidance. modulated: whether blocks have
    modulation of their own, which recipes may let them share.
    """

    name: str
    title: str
    pipelines: tuple[str, ...]
    dense_class: str
    sparse_class: str
    ratio: int
    sites: tuple[Site, ...]
    kinds: tuple[tuple[str, str], ...]
    depths: tuple[tuple[str, str], ...]
    sizes: Mapping[str, int]
    beside: Mapping[str, Beside]
    titled: Callable[[Config], str]
    drawing: Callable[[Callable[[str], Config]], dict[str, Any]]
    anatomy: Callable[[Config, Any, int, int], list[Stack]]
    inputs: Callable[[nn.Module, Batch, Tensor, Tensor], dict[str, Any]]
    embedding: Callable[[nn.Module, Batch, Tensor], Tensor]
    random_text: Callable[[Config, int, Any], dict[str, Tensor]]
    text_length: Callable[[Any], int]
    encode_text: Callable[[Any, list[str], int], dict[str, Tensor]]
    encode_images: Callable[[Any, Tensor], Tensor]
    places: Callable[[Any, Batch, int, int], dict[str, Tensor]]
    noise: Callable[[Any, int, int, Any], Tensor]
    trajectory: Callable[[Any, Batch, Tensor, Mapping[str, Any], Callable[..., Any]], None]
    halvings: Callable[[Config], int] = halved
    restore: Callable[[nn.Module], None] = lambda model: None
    check_blocks: Callable[[Blocks, Mapping[str, int]], None] = lambda blocks, depth: None
    noised: Callable[..., tuple[Tensor, Tensor, Tensor]] = flow_matching
    predicted: Callable[[Tensor], Tensor] = lambda output: output
    times: Callable[[Any], Tensor] = lambda scheduler: scheduler.sigmas.float().cpu()
    drawn: Callable[[Any, dict[str, Any]], Any] = lambda pipe, keywords: pipe(**keywords)
    aliases: tuple[str, ...] = ()
    streams: tuple[str, ...] = ("text", "image")
    sources: tuple[str, ...] = SOURCES
    others: tuple[str, ...] = ()
    text_before: int = 0
    unconditional: float = 0.0
    modulated: bool = True
    tags: tuple[str, ...] = ()


def check_adaln(family: Family, mode: str) -> None:
    """ValueError, in one sentence, for a mode of modulation that its blocks cannot have."""
    if mode != "full" and not family.modulated:
        raise ValueError(
            f"adaln.mode is {mode}, but blocks of {family.title} share one modulation already;"
            " expected full: take `adaln` out of the recipe."
        )
