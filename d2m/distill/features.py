"""What a transformer's blocks put out, caught by forward hooks.

No forward of diffusers is overridden: blocks return the streams that their family names.
A feature is named by the dense model's block, so that a student's and a teacher's find each other:
a group that skips blocks has one feature per stream, named after its last block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2m.distill.losses import token_loss
from d2m.families import family_of_model
from d2m.model.block_group import JOINT_MASK, BlockGroup, SkippedBlock, named_inputs, text_mask
from d2m.model.sparse_ffn import SparseFFN
from d2m.model.surgery import sparse_ffns

IMAGE, TEXT = "image", "text"  # streams: the output is made from the image's


def feature_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs are features: dense block name -> block, or group that skips."""
    found: dict[str, nn.Module] = {}
    for _, name in family_of_model(model).blocks.kinds:
        for index, block in enumerate(getattr(model, name)):
            if isinstance(block, BlockGroup) and block.kappa < len(block.blocks):
                found[f"{name}.{block.indices[-1]}"] = block
            elif isinstance(block, BlockGroup):
                found |= {f"{name}.{i}": each for i, each in block.blocks.items()}
            elif not isinstance(block, SkippedBlock):
                found[f"{name}.{index}"] = block
    return found


def feature_names(model: nn.Module) -> list[str]:
    """The features of `model` in order: `transformer_blocks.0.text`, `transformer_blocks.0.image`.

    Each stream of a block is a layer of its own (ours): their magnitudes differ by far. The last
    block's other streams are left out, since nothing reads them.
    """
    blocks, streams = list(feature_blocks(model)), family_of_model(model).blocks.streams
    names = [f"{block}.{stream}" for block in blocks[:-1] for stream in streams]
    return [*names, f"{blocks[-1]}.{IMAGE}"]


def group_feature_names(model: nn.Module) -> list[str]:
    """Those of `feature_names` that groups put out, which is after their last block."""
    blocks = feature_blocks(model)
    groups = {name for name, block in blocks.items() if isinstance(block, BlockGroup)}
    return [name for name in feature_names(model) if name.rpartition(".")[0] in groups]


@contextmanager
def block_features(
    model: nn.Module, names: Sequence[str] | None = None
) -> Iterator[dict[str, Tensor]]:
    """A dict that every forward of `model` fills with its features, each [B, T, D].

    `names`: which, of this or of another model's `feature_names`; None: all of them. The tensors
    are the blocks' own outputs: no copy is made and gradients flow. Clear the dict after use, it
    keeps them alive.
    """
    features: dict[str, Tensor] = {}
    wanted = set(feature_names(model) if names is None else names)
    streams = family_of_model(model).blocks.streams
    length = 0

    def begin(module: nn.Module, args: tuple, given: dict[str, Any]) -> None:
        nonlocal length
        states = given.get("encoder_hidden_states")  # none where both streams are always one
        length = 0 if states is None else states.shape[1]

    def keep(block_name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple, output: tuple[Tensor, ...] | Tensor) -> None:
            if isinstance(output, Tensor):  # the only stream, or both joined, the text's first
                both = output[:, :length], output[:, length:]
                output = both if len(streams) > 1 else (output,)
            for stream, tensor in zip(streams, output):
                if f"{block_name}.{stream}" in wanted:
                    features[f"{block_name}.{stream}"] = tensor

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(begin, with_kwargs=True))
        for block_name, block in feature_blocks(model).items():
            if any(f"{block_name}.{stream}" in wanted for stream in streams):
                hooks.enter_context(block.register_forward_hook(keep(block_name)))
        yield features


def feature_errors(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    names: Sequence[str] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per layer, each [L]: the mean squared error, the teacher's norm, the teacher's mean square.

    Layers in the order of `names`, or of the teacher's. mask [B, L]: true for the tokens of the
    text that count, as in `d2m.distill.losses.token_loss`; what fills it up is in none of the
    figures.
    """
    names = list(teacher) if names is None else names
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for name in names:
        aim = teacher[name].detach()
        counted = mask if name.endswith(f".{TEXT}") else None
        error = token_loss(student[name], aim, counted)
        if counted is None:
            norm = torch.linalg.vector_norm(aim, dtype=error.dtype)
            power = norm.square() / aim.numel()
        else:
            norm = torch.linalg.vector_norm(aim[counted], dtype=error.dtype)
            power = token_loss(torch.zeros_like(aim), aim, counted)
        found.append((error, norm, power))
    errors, norms, powers = (torch.stack(each) for each in zip(*found))
    return errors, norms, powers


@contextmanager
def without_padding(model: nn.Module) -> Iterator[None]:
    """Within: logits that FFNs of texts keep are of the tokens that a mask names, [N, E].

    Of families whose blocks get such a mask, of the text or of both streams; other models' stay as
    they are. What a text is filled up with reaches no image, so that nothing should be learnt from
    its routing.
    """
    sites = family_of_model(model).blocks.sites
    ends = {site.module: site.stream for site in sites if site.stream != IMAGE}

    def keep(ffn: SparseFFN, stream: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            given = named_inputs(module, args, kwargs)
            mask = text_mask(given) if stream == TEXT else given.get(JOINT_MASK)
            if mask is not None and ffn.last_logits is not None:
                ffn.last_logits = ffn.last_logits[mask.bool()]

        return hook

    with ExitStack() as hooks:
        for name, ffn in sparse_ffns(model).items():
            for end, stream in ends.items():
                if name.endswith(f".{end}"):
                    block = model.get_submodule(name.removesuffix(f".{end}"))
                    hooks.enter_context(
                        block.register_forward_hook(keep(ffn, stream), with_kwargs=True)
                    )
        yield
