"""How much a dense transformer's output suffers: from a block left out, from an FFN made sparse.

Damage is |y - y_dense|^2 / |y_dense|^2 over calibration batches, y the predicted velocity, with one
change at a time and everything else dense. Nothing is trained and the model is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from d2m.families import Site, family_of_model
from d2m.families.ffn_sites import neurons_at, sites_of
from d2m.families.flow import generator_at
from d2m.families.inputs import noised, prediction, transformer_inputs
from d2m.model.block_group import SkippedBlock
from d2m.model.routing import route, routing_dtype
from d2m.model.surgery import gate_weight, linear_at, split_neurons
from d2m.recipe.recipe import Batches, Progress, SparseSpec, hidden_sizes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from d2m.recipe.recipe import Recipe


Point = tuple[dict[str, Any], "Tensor"]  # a model's inputs, and the noisy latents among them
QUARTER = 4  # ours: a relative error of the whole output needs fewer samples than neurons' scores


@dataclass(frozen=True)
class Sensitivity:
    """Damages, by kind of block.

    skipped: kind -> (first, length) -> damage without these blocks. ffn: kind -> block -> damage
    with the block's FFNs of each structure to try, before any training.
    """

    skipped: dict[str, dict[tuple[int, int], float]]
    ffn: dict[str, list[list[float]]]


def sensitivity(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    scores: Mapping[str, Tensor],
    specs: Sequence[SparseSpec],
    longest: int,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure a dense transformer on the first quarter of the recipe's calibration batches.

    Args:
        scores: importance of the neurons, site name -> [N] (`neuron_importance`).
        specs: structures of an FFN to try in every block, with their own top_k.
        longest: runs of up to so many blocks are left out.

    It costs (1 + blocks * (longest + specs)) forward passes a batch.
    """
    family = family_of_model(model)
    count = max(1, recipe.calibration.batches // QUARTER)
    data = [_inputs(model, batches, recipe, i, seed) for i in range(count)]
    lists: dict[str, Any] = {kind: model.get_submodule(name) for kind, name in family.blocks.kinds}
    sites = sites_of((name for name, _ in model.named_parameters()), family)
    runs = {
        kind: [(i, n) for n in range(1, longest + 1) for i in range(len(blocks) - n + 1)]
        for kind, blocks in lists.items()
    }
    total = sum(len(runs[kind]) + len(blocks) * len(specs) for kind, blocks in lists.items())
    done = 0

    def counted(value: float) -> float:
        nonlocal done
        done += 1
        if progress:
            progress("sensitivity", done, total)
        return value

    with torch.no_grad():
        expected = [_run(model, point) for point in data]
        skipped: dict[str, dict[tuple[int, int], float]] = {}
        ffn: dict[str, list[list[float]]] = {}
        for kind, name in family.blocks.kinds:
            skipped[kind] = {}
            for first, length in runs[kind]:
                with left_out(lists[kind], range(first, first + length)):
                    skipped[kind][first, length] = counted(damage(model, data, expected))
            ffn[kind] = []
            for index in range(len(lists[kind])):
                here = [row for row in sites if row[1] == f"{name}.{index}"]
                row = []
                for spec in specs:
                    with sparse_sites(model, here, scores, spec, recipe.seed):
                        row.append(counted(damage(model, data, expected)))
                ffn[kind].append(row)
    return Sensitivity(skipped, ffn)


def damage(model: nn.Module, data: Sequence[Point], expected: Sequence[Tensor]) -> float:
    """|y - expected|^2 / |expected|^2 over all batches."""
    lost = sum(float((_run(model, at) - y).square().sum()) for at, y in zip(data, expected))
    return lost / sum(float(y.square().sum()) for y in expected)


@contextmanager
def left_out(blocks: Any, indices: Sequence[int]) -> Iterator[None]:
    """Within: these blocks of a list hand both streams on."""
    before = [blocks[i] for i in indices]
    try:
        for i in indices:
            blocks[i] = SkippedBlock(blocks[i])
        yield
    finally:
        for i, block in zip(indices, before):
            blocks[i] = block


@contextmanager
def sparse_sites(
    model: nn.Module,
    sites: Sequence[tuple[str, str, Site]],
    scores: Mapping[str, Tensor],
    spec: SparseSpec,
    seed: int,
) -> Iterator[None]:
    """Within: dense FFNs answer as a conversion's would before training, with its first gates.

    A converted FFN is the dense one with each token's hidden neurons multiplied by 1 (shared), by
    E times its gate (experts of the token's choice) or by 0: hooks do that.
    """
    with ExitStack() as hooks:
        for name, block_name, site in sites:
            block = model.get_submodule(block_name)
            for hook in _hooks(block, name, site, scores[name], spec, seed):
                hooks.enter_context(hook)
        yield


def _hooks(
    block: nn.Module, name: str, site: Site, scores: Tensor, spec: SparseSpec, seed: int
) -> list[Any]:
    """The hooks of one FFN: its input tells the gates, the input of its second Linear is scaled."""
    fc1, fc2 = linear_at(block, site.fc1), linear_at(block, site.fc2)
    dim, neurons = fc1.in_features, neurons_at(site, fc1.out_features, fc2.in_features)
    count, (shared, width) = spec.num_experts, hidden_sizes(neurons, spec)
    device = fc1.weight.device
    gate = gate_weight(name, count, dim, seed).to(device)
    expert = torch.full((neurons,), count, device=device)  # the last column: always on
    places = split_neurons(scores, shared, count)[shared:].to(device)
    expert[places] = torch.arange(count, device=device).repeat_interleave(width)
    scales: list[Tensor] = []

    def record_gates(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        weights = x.new_zeros(*x.shape[:-1], count + 1)
        weights[..., count] = 1
        if spec.top_k:
            dtype = routing_dtype(x)
            logits = torch.nn.functional.linear(x.to(dtype), gate.to(dtype))
            _, gates, chosen = route(logits.reshape(-1, count), spec.top_k)
            shape = (*x.shape[:-1], spec.top_k)
            weights.scatter_(-1, chosen.view(shape), (count * gates).view(shape).to(x.dtype))
        scales.append(weights)

    def scale(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].clone()
        hidden[..., -neurons:] *= scales.pop()[..., expert]
        return (hidden, *args[1:])

    return [fc1.register_forward_pre_hook(record_gates), fc2.register_forward_pre_hook(scale)]


def _inputs(model: nn.Module, batches: Batches, recipe: Recipe, index: int, seed: int) -> Point:
    """One calibration batch as the model's inputs, at random noise levels; its noisy latents."""
    batch = batches(index, recipe.calibration.batch_size)
    generator = generator_at(seed, "sensitivity", index)
    x, t, _ = noised(model, batch, generator, recipe.t_mean, recipe.t_std)
    return transformer_inputs(model, batch, x, t.to(x.dtype)), x


def _run(model: nn.Module, point: Point) -> Tensor:
    inputs, x = point
    return prediction(model, model(**inputs, return_dict=False)[0], x).double()
