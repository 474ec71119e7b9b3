"""Before it is made: parameters, FLOPs, memory, what fits.

Configs and recipes enter, numbers leave; no weights are read. Memory of convert, export and run is
estimated in `needs`, of distillation on GPUs in `gpus`.

    count         What a model will cost before it is made: parameters, FLOPs and memory
    tables        A plan as a person reads it: a table by component
    presets       Which recipe a name means for a model: groups are lists of block indices
    model_config  What a plan is made for: a model's config and image size
    hub           A pipeline's directory, given as a path or as an id of the Hugging Face hub
    needs         What convert, export and run will need, before they start: memory, disk and time
    fits_here     What each stage needs, compared with this machine
    gpus          What distillation takes of every GPU, estimated
    machine       What this machine has and how fast it is: cores, memory, disk, GPUs
    doctor        `d2m doctor`: what is installed and works, what this machine can do with FLUX.1
"""

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from d2m.plan.count import plan

__getattr__, __dir__, __all__ = lazy(__name__, {"d2m.plan.count": "plan"})
