"""What may be changed without training: experts that a token uses, blocks that a group keeps.

Either is one number, or a list with one for every denoising step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from d2m.model.block_group import block_groups, set_kappa
from d2m.model.surgery import restored, set_top_k, sparse_ffns

Knob = int | Sequence[int] | None  # one number, or one for every denoising step


@contextmanager
def knobs(
    model: nn.Module, steps: int, *, top_k: Knob = None, kappa: Knob = None
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Within: `model` uses `top_k` experts a token and keeps `kappa` blocks of a group.

    Yields a function for a diffusers pipeline's `callback_on_step_end`, which sets the next step's
    numbers where a list is given. Entering sets the first step's, and so does the last step's
    callback, for the next batch. None leaves a knob alone. Restored after.

    Args:
        steps: denoising steps of a generation, the length that lists must have.

    Raises ValueError for a list of another length, a number out of range, or a knob that the model
    does not have.
    """
    ffns, groups = sparse_ffns(model), block_groups(model)
    settings = [
        (set_top_k, _per_step("top_k", top_k, steps, bool(ffns), "experts")),
        (set_kappa, _per_step("kappa", kappa, steps, bool(groups), "groups of blocks")),
    ]

    def set_step(step: int) -> None:
        for setter, numbers in settings:
            if numbers:
                setter(model, numbers[step % steps])

    def on_step_end(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        set_step(step + 1)
        return tensors

    with restored(ffns.values(), "top_k"), restored(groups.values(), "kappa"):
        for step in range(steps):  # every number is tried before anything is generated
            set_step(step)
        set_step(0)
        yield on_step_end


def _per_step(name: str, knob: Knob, steps: int, there: bool, what: str) -> list[int]:
    """The knob as a list over the steps, empty for None."""
    if knob is None:
        return []
    if not there:
        raise ValueError(f"{name} is {knob} but the model has no {what}; leave {name} out.")
    if isinstance(knob, int):
        return [knob] * steps
    if len(knob) != steps:
        raise ValueError(
            f"{name} has {len(knob)} numbers for {steps} denoising steps; give one number, or as "
            "many as there are steps."
        )
    return list(knob)
