"""The sparse FLUX transformer as a diffusers model: loads and saves like any other.

diffusers 0.42 imports no library that a checkpoint names, so a program says `import d2m` before
`DiffusionPipeline.from_pretrained(SPARSE)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from d2m.adaln import share_adaln
from d2m.families import Family, hidden_sizes, spec_at
from d2m.grouping import group_blocks, grouped_state_dict
from d2m.recipe import Recipe, SparseSpec
from d2m.structure import adaln_from, blocks_from, check_shares, shares_from
from d2m.surgery import convert_state_dict, set_top_k, sparsify, split_neurons

__all__ = ["SparseFluxTransformer2DModel", "set_top_k", "sparse_model_of"]


class SparseFluxTransformer2DModel(FluxTransformer2DModel):
    """FluxTransformer2DModel whose FFNs are SparseFFNs; forward() is diffusers' own.

    Config: the dense model's fields and num_experts, shared_ratio, expert_ratio, top_k, renormalise
    (see SparseFFN); groups, kappa, alpha, drop: Mixture of Blocks, `groups` and `drop` as the
    recipe's `blocks` has them; adaln, adaln_rank: the recipe's mode and rank; shares: the recipe's.
    What a checkpoint does not name is as in the dense model. `set_top_k(model, k)` and
    `d2m.groups.set_kappa` change what runs. Gates and routers stay float32 under
    `from_pretrained(..., torch_dtype=bfloat16)`.
    """

    # What diffusers writes into model_index.json as the library: ["d2m", "SparseFlux..."].
    __module__ = "d2m"

    _keep_in_fp32_modules = ["gate", "router"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "gate", "router"]
    _no_split_modules = [*FluxTransformer2DModel._no_split_modules, "BlockGroup"]
    _tp_plan = None  # the dense plan names Linears that are no longer there

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        num_experts: int = 12,
        shared_ratio: float = 1.0,
        expert_ratio: float = 0.25,
        top_k: int = 2,
        renormalise: bool = False,
        groups: dict[str, Any] | None = None,
        kappa: int = 1,
        alpha: float = 0.5,
        drop: dict[str, Any] | None = None,
        adaln: str = "full",
        adaln_rank: int | None = None,
        shares: dict[str, Any] | None = None,
    ):
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        blocks = {"groups": groups or {}, "kappa": kappa, "alpha": alpha, "drop": drop or {}}
        made = blocks_from(blocks, "the config's blocks")
        sizes = shares_from(shares or {}, made, "the config's shares")
        check_shares(sizes, {"double": num_layers, "single": num_single_layers})
        spec = SparseSpec(num_experts, shared_ratio, expert_ratio, top_k, renormalise, sizes)
        sparsify(self, spec)
        share_adaln(self, adaln_from({"mode": adaln, "rank": adaln_rank}, "the config's adaln"))
        group_blocks(self, made)


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
) -> SparseFluxTransformer2DModel:
    """The sparse model of a dense transformer, on its device, before any training.

    Its modulation is the dense model's whatever the recipe says: `adalnfit.compress_adaln` is next.

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
        model = SparseFluxTransformer2DModel(**config, **structure(recipe))
    permutations = {}
    for name, score in scores.items():
        own = spec_at(spec, name, family)
        shared, _ = hidden_sizes(score.numel() // family.ratio, score.numel(), own)
        permutations[name] = split_neurons(score, shared, spec.num_experts)
    values = convert_state_dict(dense.state_dict(), permutations, spec, family, recipe.seed)
    values = grouped_state_dict(values, recipe.blocks, family, recipe.seed)
    model.load_state_dict(values, assign=True)
    return model.to(next(dense.parameters()).device).eval()
