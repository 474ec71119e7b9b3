"""What a family of models is to d2m: a row of four records, of names and of plain functions.

A row stands in a folder of its own, `d2m/families/NAME/`, with the functions it names; its model is
not imported before one of them runs. docs/families.md shows how one was added.
Letters: B batch, T image tokens, D width. `latents` [B, ...] are of the shape that the family's
transformer takes: FLUX's are packed [B, T, C], SD3's are [B, C, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d2m.families.encoders import EncoderSize
from d2m.families.flow import Batch, Config, flow_matching
from d2m.families.site import Site
from d2m.families.weights import Stack, Structure, dim_of
from d2m.recipe.structure import Blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

SOURCES = ("shapes", "emoji", "pictures", "prompts")


@dataclass(frozen=True)
class Names:
    """By what a family is known.

    name: in manifests and of preset folders; title: for people; pipelines: diffusers' pipeline
    classes; editors: those of them that are given an image besides the prompt; dense_class,
    sparse_class: of its transformer; aliases: other names that the dense class has in configs;
    tags: of the model card.
    title_of(config): the title of one model of the family.
    """

    name: str
    title: str
    pipelines: tuple[str, ...]
    dense_class: str
    sparse_class: str
    title_of: Callable[[Config], str]
    editors: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockLayout:
    """Where its transformer keeps blocks and FFNs, for whoever changes them.

    sites: its FFNs; kinds: (kind as recipes name it, the model's list of such blocks), in the order
    they run; depths: (kind, the config's field with the number of them); hidden(config): neurons of
    a dense FFN, four times the width by default; streams: what a block returns, in its order, the
    image's being "image"; modulated: whether blocks have modulation of their own, which recipes may
    let them share.
    check_blocks(blocks, depth): ValueError, in one sentence, for groups that it cannot have.
    embedder: the model's submodule that makes temb, where blocks are not given it.
    temb_width(D): numbers of temb. first_tokens(the model's keywords): where blocks get both
    streams joined, tokens of the one that comes first, the text by default. router_reads(a block's
    keywords, these tokens): image, text, temb and the text's mask or None, for a group's router;
    None where they have the names that most families give them.
    vectors(config, the list's name, index): where it makes vectors of modulation [B, N, D] in place
    of temb, those that a block is given. recomputed: whether diffusers' own gradient checkpointing
    gives blocks all that its forward does.
    restore(model): what is no part of a state dict, made again after the meta device.
    """

    sites: tuple[Site, ...]
    kinds: tuple[tuple[str, str], ...]
    depths: tuple[tuple[str, str], ...]
    hidden: Callable[[Config], int] = lambda config: 4 * dim_of(config)
    streams: tuple[str, ...] = ("text", "image")
    modulated: bool = True
    embedder: str | None = None
    temb_width: Callable[[int], int] = lambda dim: dim
    first_tokens: Callable[[Mapping[str, Any]], int] = lambda given: given[
        "encoder_hidden_states"
    ].shape[1]
    router_reads: Callable[[Mapping[str, Any], int], tuple[Any, ...]] | None = None
    vectors: Callable[[Config, str, int], list[int]] | None = None
    recomputed: bool = True
    check_blocks: Callable[[Blocks, Mapping[str, int]], None] = lambda blocks, depth: None
    restore: Callable[[nn.Module], None] = lambda model: None


@dataclass(frozen=True)
class Data:
    """What the transformer and its pipeline are called with, for training, calibration and images.

    Functions of the transformer:
        inputs(model, batch, x, t): keyword inputs of forward; x noisy latents, t [B] in [0, 1].
        embedding(model, batch, t): temb [B, D], which AdaLN and routers read.
        random_text(config, n, generator): the part of a batch that `embedding` reads, made up.
        noised(batch, generator, mean, std, rows): (x_t, t [B] in [0, 1], what the model is to
            predict), as `d2m.families.flow.noisy` makes them of a batch's latents.
        predicted(output): what of the model's output is a prediction; the rest teaches nothing.
    Functions of its pipeline:
        text_length(pipe): tokens of the longest text that it is trained with.
        encode_text(pipe, captions, length): conditions of a batch, each [B, ...].
        encode_images(pipe, uint8 [B, H, W, 3]): latents as the transformer takes them.
        position_ids(pipe, batch, height, width): `img_ids` [T, 3] (row and column of every image
            token in columns 1 and 2) and whatever else all samples of a batch share.
        noise(pipe, height, width, generator): one sample's pure noise, [...] as latents.
        times(scheduler): [steps + 1], the times t of the last generation's points, from about 1
            to 0.
        generate(pipe, keywords): the pipeline's answer when called with FluxPipeline's keywords.
        guided(pipe): whether it generates with classifier-free guidance, where `unconditional` is
            not 0 but not all of the family's models do.
    prompt_embeds: the pipeline's keyword for an encoded prompt -> its name among the conditions.
    sources: which of SOURCES it can learn from. unconditional: the share of captions that are left
    empty, for models that generate with classifier-free guidance.
    """

    inputs: Callable[[nn.Module, Batch, Tensor, Tensor], dict[str, Any]]
    embedding: Callable[[nn.Module, Batch, Tensor], Tensor]
    text_length: Callable[[Any], int]
    encode_text: Callable[[Any, list[str], int], dict[str, Tensor]]
    encode_images: Callable[[Any, Tensor], Tensor]
    position_ids: Callable[[Any, Batch, int, int], dict[str, Tensor]]
    noise: Callable[[Any, int, int, Any], Tensor]
    prompt_embeds: Mapping[str, str]
    random_text: Callable[[Config, int, Any], dict[str, Tensor]] = lambda config, n, generator: {}
    noised: Callable[..., tuple[Tensor, Tensor, Tensor]] = flow_matching
    predicted: Callable[[Tensor], Tensor] = lambda output: output
    times: Callable[[Any], Tensor] = lambda scheduler: scheduler.sigmas.float().cpu()
    generate: Callable[[Any, dict[str, Any]], Any] = lambda pipe, keywords: pipe(**keywords)
    sources: tuple[str, ...] = SOURCES
    unconditional: float = 0.0
    guided: Callable[[Any], bool] = lambda pipe: True

    def unconditional_of(self, pipe: Any) -> float:
        """`unconditional` for one pipeline: 0 where that is not guided by a negative prompt."""
        return self.unconditional if self.guided(pipe) else 0.0


def vae_halvings(vae: Config) -> int:
    """AutoencoderKL's halvings; 3, which all large models have, where a config does not say."""
    levels = vae.get("block_out_channels")
    return len(levels) - 1 if isinstance(levels, list) and levels else 3


def longest_text(read: Callable[[str], Config], tokenizer: str, most: int) -> int:
    """Tokens that a tokenizer of the directory takes, at most `most`.

    (transformers writes 1e30 for one without a limit.)
    """
    length = read(f"{tokenizer}/tokenizer_config.json").get("model_max_length", most)
    return min(length if isinstance(length, int) else most, most)


def square_defaults(
    read: Callable[[str], Config], tokenizer: str, most: int, steps: int, guidance: float
) -> dict[str, Any]:
    """Defaults of a model whose `sample_size` is the side of its latents; `most`: text tokens."""
    side = int(read("transformer/config.json").get("sample_size", 128))
    side *= 2 ** vae_halvings(read("vae/config.json"))
    return {
        "height": side,
        "width": side,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "max_sequence_length": longest_text(read, tokenizer, most),
    }


@dataclass(frozen=True)
class Plan:
    """What is known of a model from its configs alone, torch-free: for `d2m plan` and defaults.

    sizes: the transformer config's fields that decide sizes, with diffusers' defaults; others:
    fields of other types that `weights` and `title_of` read; encoders: folder of a component beside
    the transformer -> its size in published models, or a function of the transformer's config that
    gives these; text_before: tokens of the transformer's text
    that `max_sequence_length` does not count.
    weights(config, structure, image tokens, text tokens): all weights of the transformer.
    generation_defaults(directory's config reader): what `d2m.families.generation_defaults` falls
    back to. halvings(the VAE's config): how often it halves an image's sides.
    """

    sizes: Mapping[str, int]
    encoders: Mapping[str, EncoderSize] | Callable[[Config], Mapping[str, EncoderSize]]
    weights: Callable[[Config, Structure, int, int], list[Stack]]
    generation_defaults: Callable[[Callable[[str], Config]], dict[str, Any]]
    others: tuple[str, ...] = ()
    text_before: int = 0
    halvings: Callable[[Config], int] = vae_halvings


@dataclass(frozen=True)
class Family:
    """A row of d2m/families/known.py: what conversion, planning and data need to know of a
    model."""

    names: Names
    blocks: BlockLayout
    data: Data
    plan: Plan


def check_adaln(family: Family, mode: str) -> None:
    """ValueError, in one sentence, for a mode of modulation that its blocks cannot have."""
    if mode != "full" and not family.blocks.modulated:
        raise ValueError(
            f"adaln.mode is {mode}, but blocks of {family.names.title} share one modulation"
            " already; expected full: take `adaln` out of the recipe."
        )
