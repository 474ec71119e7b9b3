"""Before it is made: parameters, FLOPs, memory, what fits.

Configs and recipes enter, numbers leave; no weights are read. Memory of convert, export and run is
estimated in `needs`, of distillation on GPUs in `gpus`.

    count         What a model will cost before it is made: parameters, FLOPs and memory, from
                  numbers alone
    tables        A plan as a person reads it: a table by component, and one sentence of what it
                  comes to
    presets       Which recipe a name means for a model: groups are lists of block indices, so they
                  fit one depth
    model_config  What a plan is made for: a model's config and how it draws, from a directory or
                  shipped as JSON
    hub           A pipeline's directory, given as a path or as an id of the Hugging Face hub
    needs         What convert, export and run will need, before they start: memory, disk and time,
                  by formula
    fits_here     What each stage needs, against this machine: what fits is told, what cannot is
                  refused early
    gpus          What distillation takes of every GPU, estimated: how many GPUs of which memory a
                  recipe needs
    machine       What this machine has and how fast it is: cores, memory, disk, GPUs, and two
                  quick measurements
    doctor        `d2m doctor`: what is installed and works, what this machine can do with FLUX.1,
                  and advice
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from d2m.plan.count import plan

__all__ = ["plan"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "plan": "d2m.plan.count",
    },
)
