"""What a transformer's blocks put out, caught by forward hooks.

No forward of diffusers is overridden: blocks return the streams that their family names.
A feature is named by the dense model's block, so that a student's and a teacher's find each other:
a group that skips blocks has one feature per stream, named after its last block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from d2m.families import family_of_model
from d2m.groups import BlockGroup, Passed
from d2m.losses import output_loss

PICTURE = "image"  # the stream that the output is made from


def feature_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs are features: dense block name -> block, or group that skips."""
    found: dict[str, nn.Module] = {}
    for _, name in family_of_model(model).kinds:
        for index, block in enumerate(getattr(model, name)):
            if isinstance(block, BlockGroup) and block.kappa < len(block.blocks):
                found[f"{name}.{block.indices[-1]}"] = block
            elif isinstance(block, BlockGroup):
                found |= {f"{name}.{i}": each for i, each in block.blocks.items()}
            elif not isinstance(block, Passed):
                found[f"{name}.{index}"] = block
    return found


def feature_names(model: nn.Module) -> list[str]:
    """The features of `model` in order: `transformer_blocks.0.text`, `transformer_blocks.0.image`.

    Each stream of a block is a layer of its own (ours): their magnitudes differ by far. The last
    block's other streams are left out, since nothing reads them.
    """
    blocks, streams = list(feature_blocks(model)), family_of_model(model).streams
    names = [f"{block}.{stream}" for block in blocks[:-1] for stream in streams]
    return [*names, f"{blocks[-1]}.{PICTURE}"]


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
    streams = family_of_model(model).streams
    handles = []

    def keep(block_name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple, output: tuple[Tensor, ...] | Tensor) -> None:
            for stream, tensor in zip(streams, (output,) if isinstance(output, Tensor) else output):
                if f"{block_name}.{stream}" in wanted:
                    features[f"{block_name}.{stream}"] = tensor

        return hook

    try:
        for block_name, block in feature_blocks(model).items():
            if any(f"{block_name}.{stream}" in wanted for stream in streams):
                handles.append(block.register_forward_hook(keep(block_name)))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def feature_errors(
    student: dict[str, Tensor], teacher: dict[str, Tensor], names: Sequence[str] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per layer: the mean squared error [L], the teacher's norm [L], the relative error [L].

    Relative is ||student - teacher||^2 / ||teacher||^2, detached; layers in the order of `names`,
    or of the teacher's.
    """
    names = list(teacher) if names is None else names
    aims = [teacher[name] for name in names]
    errors = torch.stack([output_loss(student[name], aim) for name, aim in zip(names, aims)])
    norms = torch.stack([torch.linalg.vector_norm(aim, dtype=errors.dtype) for aim in aims])
    sizes = torch.tensor([aim.numel() for aim in aims], device=errors.device)
    return errors, norms, errors.detach() * sizes / norms.square().clamp_min(1e-30)
