"""Values of shared modulation, in closed form: the least-squares start from the dense norms.

Every norm of the dense model computes W s + b of s = silu(temb). Both fits minimise the mean square
of what changes, over calibration data, summed over all norms; they need its mean and covariance
alone. The norms' weights come from a model, or from a checkpoint's files, one norm's at a time.
D width, K rows of all norms' W together (n D each, n = 6 or 3), r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m.families import family_of_model
from d2m.families.family import check_adaln
from d2m.families.flow import generator_at
from d2m.families.inputs import global_embedding, noised
from d2m.model.grouping import dense_name
from d2m.model.modulation import SharedAdaLN, norms, own_linear, rank_of, share_adaln
from d2m.recipe.recipe import Batches, Recipe
from d2m.recipe.structure import AdaLN
from d2m.shards import Shards

RIDGE = 1e-4  # ours: share of the mean variance that directions without calibration data count for


@torch.no_grad()
def modulation_moments(
    model: nn.Module, batches: Batches, recipe: Recipe, seed: int = 0
) -> dict[str, Tensor]:
    """Moments of s = silu(temb) over the recipe's calibration batches, on the CPU in float64.

    Only the embedding of time, guidance and pooled text runs. Returns mean [D], covariance [D, D].
    """
    check_adaln(family_of_model(model), recipe.adaln.mode)
    rows = []
    for i in range(recipe.calibration.batches):
        batch = batches(i, recipe.calibration.batch_size)
        generator = generator_at(seed, "adaln", i)
        _, t, _ = noised(model, batch, generator, recipe.t_mean, recipe.t_std)
        rows.append(F.silu(global_embedding(model, batch, t)).double().cpu())
    return _moments(torch.cat(rows))


def _moments(s: Tensor) -> dict[str, Tensor]:
    """Mean [D] and covariance [D, D] of the rows of s [n, D]."""
    mean = s.mean(0)
    return {"mean": mean, "covariance": (s - mean).T @ (s - mean) / s.shape[0]}


def fit_single(
    weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], mean: Tensor
) -> dict[str, Tensor]:
    """The best shared Linear(D, 6D) and tables: {"linear.weight", "linear.bias", NORM: table}.

    weights [n D, D], biases [n D] by norm. The best shared matrix is the mean of the norms' (of
    those that have the rows), a norm's table is what it then lacks at the mean s. The shared bias
    is the tables' mean, which the tables lose: equal in sum, and a sensible start for both.
    """
    rows = max(len(bias) for bias in biases.values())
    shared = torch.zeros(rows, len(mean), dtype=mean.dtype)
    bias, count = torch.zeros(2, rows, dtype=mean.dtype)
    for weight in weights.values():
        shared[: len(weight)] += weight.to(mean)
        count[: len(weight)] += 1
    shared /= count[:, None]
    tables = {
        name: biases[name].to(mean) + (weight.to(mean) - shared[: len(weight)]) @ mean
        for name, weight in weights.items()
    }
    for table in tables.values():
        bias[: len(table)] += table
    bias /= count
    tables = {name: table - bias[: len(table)] for name, table in tables.items()}
    return {"linear.weight": shared, "linear.bias": bias, **tables}


def fit_lowrank(
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    mean: Tensor,
    covariance: Tensor,
    rank: int,
) -> dict[str, Tensor]:
    """The best shared Linear(D, r) and Linear(r, n D) per norm, by reduced-rank regression.

    Of all rank-r matrices M for the stacked W [K, D], M = W P minimises E |W s - M s|^2 with
    P = C^1/2 V V^T C^-1/2, V the r first eigenvectors of C^1/2 W^T W C^1/2 (an SVD of W C^1/2 that
    never holds more than D x D). The shared weight is an orthonormal basis [r, D] of P's rows, so
    at r = D it is a rotation and M = W to rounding. Returns {"linear.weight", NORM.weight,
    NORM.bias}; the biases make the fit exact at the mean s.
    """
    dim = len(mean)
    eye = torch.eye(dim, dtype=mean.dtype)
    floor = (covariance.trace() / dim).clamp_min(torch.finfo(mean.dtype).tiny) * RIDGE
    values, vectors = torch.linalg.eigh(covariance + floor * eye)
    root = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors / values.sqrt()) @ vectors.T
    gram = torch.zeros_like(eye)
    for weight in weights.values():
        gram += weight.to(mean).T @ weight.to(mean)
    _, first = torch.linalg.eigh(root @ gram @ root)  # ascending
    first = first[:, -rank:].flip(-1)
    projection = root @ first @ (first.T @ inverse)
    basis = torch.linalg.qr((first.T @ inverse).T).Q.T
    up = projection @ basis.T  # W up is W P in the basis
    result = {"linear.weight": basis}
    for name, weight in weights.items():
        weight = weight.to(mean)
        result[f"{name}.weight"] = weight @ up
        result[f"{name}.bias"] = biases[name].to(mean) + (weight - weight @ projection) @ mean
    return result


def compress_adaln(model: nn.Module, adaln: AdaLN, moments: Mapping[str, Tensor]) -> nn.Module:
    """Replace the norms of a model in mode full by the best start of `adaln`, in place.

    `moments` as `modulation_moments` returns them. The model's config says so afterwards.
    """
    if adaln.mode == "full":
        return model
    found = list(norms(model))
    state = dict(model.named_parameters())
    own = {name: own_linear(state, name) for name in found}
    weights = {name: state[f"{own[name]}.weight"].detach().cpu() for name in found}
    biases = {name: state[f"{own[name]}.bias"].detach().cpu() for name in found}
    wide = {name: tensor.double() for name, tensor in moments.items()}
    rank = rank_of(adaln, len(wide["mean"]), sum(map(len, biases.values())) // len(wide["mean"]))
    values = _fitted(weights, biases, wide, rank)
    share_adaln(model, AdaLN(adaln.mode, rank))
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
    config: dict[str, Any] = {"adaln": adaln.mode, "adaln_rank": rank}
    model.register_to_config(**config)  # type: ignore[operator]
    return model


def _fitted(
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    rank: int | None,
) -> dict[str, Tensor]:
    """The fit under the sparse model's names: `single` where rank is None, else `lowrank`."""
    if rank is None:
        values = fit_single(weights, biases, moments["mean"])
        names = {name: f"{name}.table" for name in weights}
    else:
        values = fit_lowrank(weights, biases, moments["mean"], moments["covariance"], rank)
        parts = ("weight", "bias")
        names = {f"{name}.{part}": f"{name}.up.{part}" for name in weights for part in parts}
    names |= {key: f"modulation.{key}" for key in values if key.startswith("linear.")}
    return {names[key]: value for key, value in values.items()}


# ---------------------------------------------------------------- from a checkpoint's files


class NormWeights(Mapping[str, Tensor]):
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
    rank = None if recipe.adaln.mode == "single" else int(sparse.config.adaln_rank)
    values = _fitted(weights, biases, _moments(s), rank)
    return {name: value.to(dtype).contiguous() for name, value in values.items()}


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
    generator = generator_at(recipe.seed, "modulation")
    t = torch.sigmoid(torch.randn(n, generator=generator) * recipe.t_std + recipe.t_mean)
    text = family_of_model(sparse).data.random_text(sparse.config, n, generator)
    return F.silu(global_embedding(sparse, text, t))
