"""Shared modulation fitted from a checkpoint's files: a norm's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from d2m.adaln import SharedAdaLN, own_linear
from d2m.adalnfit import fit_lowrank, fit_single
from d2m.families import family_of_model
from d2m.family_flow import generator_at
from d2m.family_inputs import global_embedding
from d2m.grouping import dense_name
from d2m.recipe import Recipe
from d2m.shards import Shards

if TYPE_CHECKING:
    from torch import Tensor


class NormWeights(Mapping[str, "Tensor"]):
    """NORM -> its Linear's weight, read when asked for and not kept."""

    def __init__(self, source: Shards, names: list[str]):
        self.source, self.names = source, names

    def __getitem__(self, name: str) -> Tensor:
        key = f"{own_linear(self.source.where, name)}.weight"
        return self.source.read([key])[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@torch.no_grad()
def fit_from_shards(source: Shards, sparse: Any, recipe: Recipe) -> dict[str, Tensor]:
    """Values of `modulation.*` and of every norm's `table` or `up`, in the checkpoint's dtype.

    sparse: the model on the meta device. Names of norms are the dense model's. float32 arithmetic:
    at D = 3072 the sums are of a few dozen bfloat16 matrices.
    """
    found = [dense_name(n) for n, m in sparse.named_modules() if isinstance(m, SharedAdaLN)]
    weights = NormWeights(source, found)
    keys = {name: f"{own_linear(source.where, name)}.bias" for name in found}
    biases = {name: source.read([key])[key] for name, key in keys.items()}
    dtype = biases[found[0]].dtype
    s = _embeddings(source, sparse, recipe)
    mean = s.mean(0)
    if recipe.adaln.mode == "single":
        values = fit_single(weights, biases, mean)
        names = {name: f"{name}.table" for name in found}
    else:
        centred = s - mean
        covariance = centred.T @ centred / len(s)
        rank = int(sparse.config.adaln_rank)
        values = fit_lowrank(weights, biases, mean, covariance, rank)
        names = {f"{n}.{part}": f"{n}.up.{part}" for n in found for part in ("weight", "bias")}
    names |= {key: f"modulation.{key}" for key in values if key.startswith("linear.")}
    return {names[key]: value.to(dtype).contiguous() for key, value in values.items()}


def _embeddings(source: Shards, sparse: Any, recipe: Recipe) -> Tensor:
    """silu(temb) [n, D] in float32: times as in training, random pooled text.

    n is the recipe's calibration batches x batch size.
    """
    module = sparse.time_text_embed.to_empty(device="cpu")
    prefix = "time_text_embed."
    state = source.read(key for key in source.where if key.startswith(prefix))
    module.load_state_dict({k.removeprefix(prefix): v.float() for k, v in state.items()})
    module.float()
    n = recipe.calibration.batches * recipe.calibration.batch_size
    draw = generator_at(recipe.seed, "modulation")
    t = torch.sigmoid(torch.randn(n, generator=draw) * recipe.t_std + recipe.t_mean)
    text = family_of_model(sparse).data.random_text(sparse.config, n, draw)
    return F.silu(global_embedding(sparse, text, t))
