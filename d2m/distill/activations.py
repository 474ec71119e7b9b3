"""What a forward pass keeps for the backward one: all of it, or of every block its inputs alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2m.families import family_of_model
from d2m.model.block_group import BlockGroup, SkippedBlock


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Every block that computes, those of groups among them, in the model's order."""
    found: list[nn.Module] = []
    for _, name in family_of_model(model).blocks.kinds:
        for block in getattr(model, name):
            if isinstance(block, BlockGroup):
                found += block.blocks.values()
            elif not isinstance(block, SkippedBlock):
                found.append(block)
    return found


@contextmanager
def checkpointed(blocks: Iterable[nn.Module], offload: bool = False) -> Iterator[None]:
    """Within: a block keeps its inputs and computes the rest again in the backward pass.

    offload: the inputs wait in main memory. The results are the same bits. A block's `forward` is
    what is repeated, so hooks outside of it (FSDP's, features') see one call.
    """
    with ExitStack() as stack:
        for block in blocks:
            vars(block)["forward"] = _recomputed(block.forward, offload)
            stack.callback(vars(block).pop, "forward")
        yield


def _recomputed(forward: Any, offload: bool) -> Any:
    """The same function under `torch.utils.checkpoint`, tensors of its keywords kept as inputs."""

    def call(*args: Any, **kwargs: Any) -> Any:
        names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        others = {name: value for name, value in kwargs.items() if name not in names}

        def inner(*tensors: Any) -> Any:
            named = dict(zip(names, tensors[len(args) :]))
            return forward(*tensors[: len(args)], **named, **others)

        given = (*args, *(kwargs[name] for name in names))
        with ExitStack() as stack:
            if offload:
                pin = torch.cuda.is_available()
                stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=pin))
            return checkpoint(inner, *given, use_reentrant=False)

    return call
