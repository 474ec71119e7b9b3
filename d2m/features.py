"""What the blocks of a FLUX transformer put out, caught by forward hooks.

No forward of diffusers is overridden: both block types return (text stream, image stream).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from d2m.losses import output_loss

BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")


def feature_names(model: torch.nn.Module) -> list[str]:
    """The features of `model` in order: `transformer_blocks.0.text`, `transformer_blocks.0.image`.

    Each stream of a block is a layer of its own (ours): their magnitudes differ by far. The last
    block's text stream is left out, since nothing reads it.
    """
    blocks = [f"{name}.{i}" for name in BLOCK_LISTS for i in range(len(getattr(model, name)))]
    names = [f"{block}.{stream}" for block in blocks for stream in ("text", "image")]
    return names[:-2] + names[-1:]


@contextmanager
def block_features(model: torch.nn.Module, wanted: bool = True) -> Iterator[dict[str, Tensor]]:
    """A dict that every forward of `model` fills with its features, each [B, T, D].

    The tensors are the blocks' own outputs: no copy is made and gradients flow. Clear the dict
    after use, it keeps them alive. With `wanted` false no hook is set and it stays empty.
    """
    features: dict[str, Tensor] = {}
    names = set(feature_names(model)) if wanted else set()
    handles = []

    def keep(block_name: str):  # type: ignore[no-untyped-def]
        def hook(module: torch.nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
            for stream, tensor in zip(("text", "image"), output):
                if f"{block_name}.{stream}" in names:
                    features[f"{block_name}.{stream}"] = tensor

        return hook

    try:
        for block_name in sorted({name.rsplit(".", 1)[0] for name in names}):
            block = model.get_submodule(block_name)
            handles.append(block.register_forward_hook(keep(block_name)))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def feature_errors(
    student: dict[str, Tensor], teacher: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Per layer: the mean squared error [L], the teacher's norm [L], the relative error [L].

    Relative is ||student - teacher||^2 / ||teacher||^2, detached; layers in the teacher's order.
    """
    errors = torch.stack([output_loss(student[name], teacher[name]) for name in teacher])
    norms = torch.stack(
        [torch.linalg.vector_norm(tensor, dtype=errors.dtype) for tensor in teacher.values()]
    )
    sizes = torch.tensor([tensor.numel() for tensor in teacher.values()], device=errors.device)
    return errors, norms, errors.detach() * sizes / norms.square().clamp_min(1e-30)
