"""The sparse transformer.

A dense diffusers model and a recipe's structure enter, a sparse diffusers model leaves. No
forward() of diffusers is overridden: modules are put in the place of others.

    sparse_transformer  The sparse transformers as diffusers models: they load and save like any
                        other
    surgery             Dense to sparse: the structure (modules replaced in place) and the values,
                        kept apart
    sparse_ffn          The modules that take a dense FFN's place: one shared expert, routed
                        experts and their router
    experts_op          The op `d2m::routed_experts` and the modules that call it
    routing             What routing means: the gate, the choice of experts, and the reference of
                        the routed op
    experts_choice      Which realisation of the routed experts runs: decided once per kind of
                        call, and said in the log
    sorted_loop         A realisation of the routed experts for every device: sort by expert, then
                        ordinary matmuls
    grouped_mm          A realisation of the routed experts with `torch.nn.functional.grouped_mm`:
                        no count on the host
    block_group         Mixture of Blocks: a router keeps kappa of a group's m consecutive blocks,
                        sample by sample
    grouping            Groups of blocks in a model: put into its block lists, and their names in a
                        state dict
    modulation          Modulation that blocks share: modules that take the place of diffusers'
                        AdaLayerNormZero
    knobs               What may be changed without training: experts that a token uses, blocks
                        that a group keeps
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from d2m.model.block_group import set_kappa
    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel, sparse_class
    from d2m.model.surgery import set_top_k

__all__ = ["SparseFluxTransformer2DModel", "set_kappa", "set_top_k", "sparse_class"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "SparseFluxTransformer2DModel": "d2m.model.sparse_transformer",
        "set_kappa": "d2m.model.block_group",
        "set_top_k": "d2m.model.surgery",
        "sparse_class": "d2m.model.sparse_transformer",
    },
)
