"""The sparse transformers as diffusers models: they load and save like any other.

diffusers 0.42 imports no library that a checkpoint names, so a program says `import d2m` before
`DiffusionPipeline.from_pretrained(SPARSE)`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from d2m.families import FLUX, Family
from d2m.families.ffn_sites import spec_at
from d2m.model.diffusers_methods import SparseModel, Twin
from d2m.model.grouping import group_blocks, grouped_state_dict
from d2m.model.modulation import share_adaln
from d2m.model.surgery import convert_state_dict, set_top_k, sparsify, split_neurons
from d2m.recipe.recipe import Recipe, SparseSpec, hidden_sizes
from d2m.recipe.structure import KINDS, adaln_from, blocks_from, check_shares, shares_from

__all__ = ["SparseFluxTransformer2DModel", "set_top_k", "sparse_class", "sparse_model_of"]


def sparse_class(family: Family) -> Any:
    """The family's sparse transformer: diffusers' dense class whose FFNs are SparseFFNs.

    forward() is diffusers' own. Config: the dense model's fields and SPARSE_FIELDS: num_experts,
    shared_ratio, expert_ratio, top_k, renormalise (see SparseFFN); groups, kappa, alpha, drop:
    Mixture of Blocks, `groups` and `drop` as the recipe's `blocks` has them; adaln, adaln_rank: the
    recipe's mode and rank; shares: the recipe's. What a checkpoint does not name is as in the dense
    model. `set_top_k(model, k)` and `d2m.model.block_group.set_kappa` change what runs. Gates and
    routers stay float32 under `from_pretrained(..., torch_dtype=bfloat16)`.
    """
    if family.names.name not in _classes:
        _classes[family.names.name] = _make(family)
    return _classes[family.names.name]


_classes: dict[str, Any] = {}  # one class a family, or isinstance and pickles would not agree
# Fields of a sparse config added to the dense model's, with what a config without them means.
SPARSE_FIELDS: dict[str, Any] = {
    "num_experts": 12,
    "shared_ratio": 1.0,
    "expert_ratio": 0.25,
    "top_k": 2,
    "renormalise": False,
    "groups": None,
    "kappa": 1,
    "alpha": 0.5,
    "drop": None,
    "adaln": "full",
    "adaln_rank": None,
    "shares": None,
}


def _make(family: Family) -> Any:
    dense: Any = getattr(diffusers, family.names.dense_class)

    def init(self: Any, *args: Any, **fields: Any) -> None:
        given = signature.bind(self, *args, **fields)
        given.apply_defaults()
        own = {name: given.arguments.pop(name) for name in SPARSE_FIELDS}
        # By name: what diffusers gets by position it takes for a default, which from_config drops.
        dense.__init__(self, **{n: v for n, v in given.arguments.items() if n != "self"})
        _sparsify(self, family, own)

    # diffusers reads a config's fields, their order and defaults from the signature.
    shown = inspect.signature(dense.__init__)
    both = [*shown.parameters.values()]
    both += [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in SPARSE_FIELDS.items()
    ]
    signature = shown.replace(parameters=both)
    init.__signature__ = signature  # type: ignore[attr-defined]
    init.__name__ = init.__qualname__ = "__init__"
    kept = getattr(dense, "_keep_in_fp32_modules", None) or []
    patterns = getattr(dense, "_skip_layerwise_casting_patterns", None) or []
    return Twin(
        family.names.sparse_class,
        (SparseModel, dense),
        {
            # What diffusers writes into model_index.json as the library: ["d2m", "SparseFlux..."].
            "__module__": "d2m",
            "__doc__": f"{family.names.dense_class} with SparseFFNs; see d2m.model.sparse_class.",
            "__init__": register_to_config(init),
            "_keep_in_fp32_modules": [*kept, "gate", "router"],
            "_skip_layerwise_casting_patterns": [*patterns, "gate", "router"],
            "_no_split_modules": [*dense._no_split_modules, "BlockGroup"],
            "_tp_plan": None,  # the dense plan names Linears that are no longer there
            "_supports_gradient_checkpointing": family.blocks.recomputed,
        },
    )


def _sparsify(model: Any, family: Family, fields: Mapping[str, Any]) -> None:
    """The structure that SPARSE_FIELDS ask for, in place of the dense one."""
    blocks = {name: fields[name] for name in ("kappa", "alpha")}
    blocks |= {name: fields[name] or {} for name in ("groups", "drop")}
    made = blocks_from(blocks, "the config's blocks")
    sizes = shares_from(fields["shares"] or {}, made, "the config's shares")
    depth = {kind: len(getattr(model, name)) for kind, name in family.blocks.kinds}
    check_shares(sizes, dict.fromkeys(KINDS, 0) | depth)
    numbers = ("num_experts", "shared_ratio", "expert_ratio", "top_k", "renormalise")
    spec = SparseSpec(**{name: fields[name] for name in numbers}, shares=sizes)
    sparsify(model, spec, family)
    adaln = {"mode": fields["adaln"], "rank": fields["adaln_rank"]}
    share_adaln(model, adaln_from(adaln, "the config's adaln"), family)
    group_blocks(model, made, family)


SparseFluxTransformer2DModel: Any = sparse_class(FLUX)


def structure(recipe: Recipe) -> dict[str, Any]:
    """The recipe's structure as fields of the model's config, but for its modulation."""
    blocks = recipe.blocks.to_dict()
    return dataclasses.asdict(recipe.spec) | {
        "shares": recipe.shares.to_dict() or None,
        "groups": blocks["groups"] if recipe.blocks.grouped else None,
        "kappa": blocks["kappa"],
        "alpha": blocks["alpha"],
        "drop": blocks.get("drop"),
    }


def sparse_model_of(
    dense: nn.Module, scores: Mapping[str, Tensor], recipe: Recipe, family: Family
) -> nn.Module:
    """The sparse model of a dense transformer, on its device, before any training.

    Its modulation is the dense model's whatever the recipe says: `compress_adaln` is next.

    Args:
        dense: stays as it is; whatever is no FFN shares its tensors with the result.
        scores: importance of the neurons, site name -> [N].
        recipe: structure and seed.

    Structure is made on the meta device, so nothing but the FFNs is held twice. ValueError if a
    site has no score or the recipe's ratios do not fit.
    """
    spec = recipe.spec
    config = {key: value for key, value in dense.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        model: nn.Module = sparse_class(family)(**config, **structure(recipe))
    permutations = {}
    for name, score in scores.items():
        own = spec_at(spec, name, family)
        shared, _ = hidden_sizes(score.numel(), own)
        permutations[name] = split_neurons(score, shared, spec.num_experts)
    values = convert_state_dict(dense.state_dict(), permutations, spec, family, recipe.seed)
    values = grouped_state_dict(values, recipe.blocks, family, recipe.seed)
    model.load_state_dict(values, assign=True)
    family.blocks.restore(model)
    share_buffers(dense, model)
    return model.to(next(dense.parameters()).device).eval()


def share_buffers(dense: nn.Module, model: nn.Module) -> None:
    """Buffers that no checkpoint holds, such as tables computed from the config, from `dense`."""
    stored = dense.state_dict().keys()
    for name, buffer in dense.named_buffers():
        place, _, leaf = name.rpartition(".")
        if name not in stored:
            model.get_submodule(place)._buffers[leaf] = buffer
