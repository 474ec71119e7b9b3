"""The sparse transformer.

A dense diffusers model and a recipe's structure enter, a sparse diffusers model leaves. No
forward() of diffusers is overridden: modules are put in the place of others.

    sparse_transformer  The sparse transformers as diffusers models
    diffusers_methods   What diffusers' users do with a model beside calling it
    components          The models of a pipeline directory: their classes, whether weights fit them
    surgery             Dense to sparse: the structure (modules replaced in place) and the values
    sparse_ffn          The modules that take a dense FFN's place: one shared expert
    experts_op          The op `d2m::routed_experts`
    routing             What routing means: the gate, the choice of experts
    experts_choice      Which realisation of the routed experts runs: decided once per kind of call
    sorted_loop         A realisation of the routed experts for every device: sort by expert
    grouped_mm          A realisation of the routed experts with `torch.nn.functional.grouped_mm`
    block_group         Mixture of Blocks: a router keeps kappa of a group's m consecutive blocks
    grouping            Groups of blocks in a model: put into its block lists
    modulation          Modulation that blocks share
    knobs               What may be changed without training: experts that a token uses
"""

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from d2m.model.block_group import set_kappa
    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel, sparse_class
    from d2m.model.surgery import set_top_k

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "d2m.model.block_group": "set_kappa",
        "d2m.model.sparse_transformer": "SparseFluxTransformer2DModel sparse_class",
        "d2m.model.surgery": "set_top_k",
    },
)
