"""Dense to sparse: a pipeline directory enters, a sparse one leaves.

`in_memory` converts and distils; `streamed` goes block by block and never holds the whole model.

    in_memory        A dense pipeline directory becomes a sparse one: importance, surgery
    streamed         A conversion of a model larger than memory: block by block
    local            Every sparse FFN learns by itself, on the teacher's own inputs
    teacher_inputs   What enters every FFN of a model larger than memory, block by block
    dense            The dense pipeline that a conversion starts from: finding it, checking it
    first_student    The student before its first training step
    experts_fit      Experts of neurons that are active together, and routers fitted to them
    router_fit       First weights of the groups' routers that choose
    modulation_fit   Values of shared modulation, in closed form
    workdir          What lies at OUT and at OUT.work: a finished conversion, one under way
    sparse_pipeline  What a conversion leaves behind: the sparse pipeline directory
    model_card       The model card of a sparse pipeline
"""

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from d2m.convert.in_memory import convert

__getattr__, __dir__, __all__ = lazy(__name__, {"d2m.convert.in_memory": "convert"})
