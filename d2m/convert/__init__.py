"""Dense to sparse: a pipeline directory enters, a sparse one leaves.

`in_memory` converts and distils; `streamed` converts block by block without loading the model.

    in_memory        A dense pipeline directory becomes a sparse one: importance, surgery,
                     distillation, result
    streamed         A conversion without training of a model larger than memory: block by block,
                     file to file
    dense            The dense pipeline that a conversion starts from: finding it, checking it,
                     knowing it again
    first_student    The student before its first training step, from the dense model or an earlier
                     conversion
    router_fit       First weights of the groups' routers that choose: centred and scaled on
                     calibration data
    modulation_fit   Values of shared modulation, in closed form: the least-squares start from the
                     dense norms
    workdir          What lies at OUT and at OUT.work: a finished conversion, one under way, or
                     something else
    sparse_pipeline  What a conversion leaves behind: the sparse pipeline directory, its model card
                     and its report
    model_card       The model card of a sparse pipeline: README.md with the front matter the hub
                     reads
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from d2m.convert.in_memory import convert

__all__ = ["convert"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "convert": "d2m.convert.in_memory",
    },
)
