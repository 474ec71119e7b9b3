"""Experts of neurons that are active together, and routers that know them before the first step.

The paper deals neurons to experts by rank of importance and begins with random routers, so an
expert is an even sample of the FFN and which ones a token chooses is chance until training has
found a meaning for them. Here (ours), from what enters a dense FFN: neurons whose contributions
rise and fall together over tokens share an expert, by k-means with clusters of equal size; and a
router's logits are a linear fit, in closed form, to how much every expert would contribute for a
token.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m.families import Family
from d2m.families.ffn_sites import DenseFFN, read_ffn, sites_of, spec_at
from d2m.families.flow import generator_at
from d2m.families.inputs import noised, transformer_inputs
from d2m.model.experts_op import experts_op
from d2m.model.routing import activate
from d2m.model.surgery import convert_ffn, run_dense, split_neurons
from d2m.recipe.recipe import Batches, Recipe, SparseSpec, hidden_sizes

ROWS = 8192  # tokens an FFN that are looked at
JUDGED = 1024  # of them, where the gate's size is chosen
FEATURES = 256  # of a neuron: its contributions over tokens, projected at random
ROUNDS = 20  # of k-means at most; it ends where nothing moves
RIDGE = 1e-2  # of the router's fit, times the mean square of its inputs
# Standard deviations that the first logits may have; see `scaled_gate`.
SPREADS = (0.03, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)


def is_fitted(recipe: Recipe) -> bool:
    """Whether a recipe's experts or routers are those of this file."""
    return (recipe.experts, recipe.router) != ("rank", "random")


@torch.no_grad()
def fit_experts(
    dense: nn.Module, scores: Mapping[str, Tensor], batches: Batches, recipe: Recipe, family: Family
) -> dict[str, Tensor]:
    """Tensors of the sparse FFNs as the recipe's `experts` and `router` want them, by full name.

    The dense model runs on the recipe's calibration batches. scores: importance of the neurons,
    site -> [N], by which the first go to the shared experts. Names are those of a model without
    groups of blocks.
    """
    found: dict[str, Tensor] = {}
    inputs = ffn_inputs(dense, batches, recipe, family)
    for name, block, site in sites_of([n for n, _ in dense.named_parameters()], family):
        ffn = read_ffn(dense.get_parameter, block, site)
        shared, _ = hidden_sizes(ffn.neurons, spec_at(recipe.spec, name, family))
        order = split_neurons(scores[name], shared, recipe.num_experts)
        given = inputs.pop(name), ffn, site.activation, name, recipe, family
        found |= {f"{name}.{key}": value for key, value in fitted(order, *given).items()}
    return found


def fitted(
    order: Tensor,
    x: Tensor,
    ffn: DenseFFN,
    activation: str,
    name: str,
    recipe: Recipe,
    family: Family,
) -> dict[str, Tensor]:
    """A SparseFFN's tensors as the recipe's `experts` and `router` want them, by local name.

    order: its `neurons` by rank; x [T, D]: what enters the dense FFN.
    """
    spec = spec_at(recipe.spec, name, family)
    shared, hidden = hidden_sizes(ffn.neurons, spec)
    result: dict[str, Tensor] = {}
    device = ffn.fc1_w.device
    wide = ffn.to(torch.promote_types(ffn.fc1_w.dtype, torch.float32))
    x = x[:: max(1, len(x) // ROWS)].to(device, wide.fc1_w.dtype)
    order = order.to(device)
    contributions = contributions_of(x, wide, activation)
    if recipe.experts == "coactivation":
        at = generator_at(recipe.seed, "experts", name)
        tail = order[shared:]
        expert = clusters(contributions[:, tail], spec.num_experts, at)
        order = torch.cat([order[:shared], tail[expert.argsort(stable=True)]])
    made = convert_ffn(wide, order, shared, spec.num_experts)
    if recipe.experts == "coactivation":
        kind = ffn.fc1_w.dtype
        result |= {k: v.to(kind) if v.is_floating_point() else v for k, v in made.items()}
    if recipe.router == "energy":
        parts = contributions[:, order[shared:]].view(len(x), spec.num_experts, hidden)
        gate = fitted_gate(x, parts.square().sum(-1).sqrt()).to(wide.fc1_w.dtype)
        result["gate.weight"] = scaled_gate(gate, made, x[:JUDGED], wide, activation, spec)
    return {key: value.cpu() for key, value in result.items()}


def contributions_of(x: Tensor, ffn: DenseFFN, activation: str) -> Tensor:
    """|h_j(x)| |w2_j| for tokens x [T, D]: how much neuron j adds to the output; [T, N] (derived).

    The norm of a neuron's part of the answer.
    """
    columns = ffn.fc2_w.norm(dim=0)
    parts = (activate(F.linear(rows, ffn.fc1_w, ffn.fc1_b), activation) for rows in x.split(1024))
    return torch.cat([hidden.abs() * columns for hidden in parts])


def clusters(contributions: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """The expert of every neuron, int64 [R], as many neurons each: contributions [T, R].

    k-means on centred profiles of length 1, so that experts are alike in when they matter and not
    in how much; it begins with profiles far from one another (as k-means++).
    """
    profiles = (contributions - contributions.mean(0)).T.contiguous()
    if profiles.shape[1] > FEATURES:
        sketch = torch.randn(profiles.shape[1], FEATURES, generator=generator)
        profiles = profiles @ sketch.to(profiles) * FEATURES**-0.5
    profiles = F.normalize(profiles, dim=1)
    size = len(profiles) // experts
    first = int(torch.randint(len(profiles), (1,), generator=generator))
    picked, far = [first], 1 - profiles @ profiles[first]
    for _ in range(experts - 1):
        weights = far.clamp_min(1e-9).square().cpu()
        picked.append(int(torch.multinomial(weights, 1, generator=generator)))
        far = torch.minimum(far, 1 - profiles @ profiles[picked[-1]])
    centres, found = profiles[picked], torch.full((len(profiles),), -1, device=profiles.device)
    for _ in range(ROUNDS):
        nearest = evenly(profiles @ centres.T, size).to(profiles.device)
        if torch.equal(nearest, found):
            break
        found = nearest
        means = [profiles[found == expert].mean(0) for expert in range(experts)]
        centres = F.normalize(torch.stack(means), dim=1)
    return found


def evenly(likeness: Tensor, size: int) -> Tensor:
    """Which cluster each of R neurons goes to, int64 [R] on the CPU; likeness [R, E], R = E * size.

    Those that lose most by their second choice choose first, each the best that still has room.
    """
    best = likeness.topk(min(2, likeness.shape[1]), dim=1).values
    turns = (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True).tolist()
    wishes = likeness.argsort(dim=1, descending=True, stable=True).tolist()
    room, found = [size] * likeness.shape[1], [0] * len(likeness)
    for neuron in turns:
        expert = next(each for each in wishes[neuron] if room[each])
        room[expert] -= 1
        found[neuron] = expert
    return torch.tensor(found)


def fitted_gate(x: Tensor, energies: Tensor) -> Tensor:
    """A gate's weight [E, D]: logits of tokens x [T, D] rise with the experts' energies [T, E].

    Ridge regression, in closed form, on how far an expert's is above the mean of all; the logits'
    standard deviation is 1.
    """
    x, energies = x.double(), energies.double()
    above = energies - energies.mean(1, keepdim=True)
    products = x.T @ x / len(x)
    ridge = RIDGE * products.diagonal().mean() * torch.eye(x.shape[1], device=x.device).double()
    weight = torch.linalg.solve(products + ridge, x.T @ above / len(x)).T
    spread = (x @ weight.T).std().clamp_min(torch.finfo(torch.float32).tiny)
    return weight / spread


def scaled_gate(
    gate: Tensor,
    tensors: Mapping[str, Tensor],
    x: Tensor,
    ffn: DenseFFN,
    activation: str,
    spec: SparseSpec,
) -> Tensor:
    """The gate times one of SPREADS: that by which the sparse FFN is nearest to the dense one.

    Experts are stored times E for gates of 1/E. Large logits tell experts apart and make those
    that are chosen several times too loud, so the best size depends on how much they differ.
    tensors: of the sparse FFN, by `convert_ffn`; x [T, D].
    """
    top_k = max(1, spec.top_k)
    get = tensors.get
    hidden = activate(F.linear(x, tensors["shared.fc1.weight"], get("shared.fc1.bias")), activation)
    said = F.linear(hidden, tensors["shared.fc2.weight"], get("shared.fc2.bias"))
    missing = run_dense(ffn, x, activation) - said
    w1, b1, w2 = tensors["experts.w1"], get("experts.b1"), tensors["experts.w2"]

    def error(size: float) -> float:
        logits = F.linear(x, gate * size)
        return float((missing - experts_op(x, logits, w1, b1, w2, top_k, activation)).norm())

    return gate * min(SPREADS, key=error)


@torch.no_grad()
def ffn_inputs(
    dense: nn.Module, batches: Batches, recipe: Recipe, family: Family, rows: int = ROWS
) -> dict[str, Tensor]:
    """Random rows of what enters every dense FFN on the calibration batches: site -> [rows, D]."""
    kept: dict[str, list[Tensor]] = {}
    count = recipe.calibration.batches
    with ExitStack() as hooks:
        for name, block, site in sites_of([n for n, _ in dense.named_parameters()], family):
            hook = _keep(kept.setdefault(name, []), rows // count, recipe.seed, name)
            linear = dense.get_submodule(f"{block}.{site.fc1}")
            hooks.enter_context(linear.register_forward_pre_hook(hook))
        for i in range(count):
            batch = batches(i, recipe.calibration.batch_size)
            generator = generator_at(recipe.seed, "experts", i)
            x, t, _ = noised(dense, batch, generator, recipe.t_mean, recipe.t_std)
            dense(**transformer_inputs(dense, batch, x, t))
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _keep(parts: list[Tensor], rows: int, seed: int, name: str) -> Any:
    """A hook that keeps random rows of a Linear's input."""

    def hook(module: nn.Module, arguments: Any) -> None:
        x = arguments[0].reshape(-1, arguments[0].shape[-1])
        at = generator_at(seed, "rows", f"{name} {len(parts)}")
        chosen = torch.randperm(len(x), generator=at)[:rows]
        parts.append(x[chosen.to(x.device)].detach().cpu())

    return hook
