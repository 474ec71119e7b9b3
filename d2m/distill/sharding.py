"""Student and teacher spread over the processes of a run with FSDP2 (`fully_shard`).

The first process has both models whole; every process builds their structure on the meta device,
shards it block by block, and receives its part of each weight. A process then holds 1/N of

    teacher              in the precision of the recipe
    student, frozen      nothing where it is the teacher's: both models hold the same shard
    student, learning    float32, and as much again for gradient, each of Adam's moments, average

and, in turn, the whole weights of a block or two while it runs. Gates and routers stay whole in
every process, in float32: bf16 logits would choose other experts, and they are a few megabytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from d2m.distill.activations import blocks_of
from d2m.distill.batch_rows import batch_rows
from d2m.distill.gather import distributed
from d2m.distill.learner import learnt_names
from d2m.distill.processes import Crew, any_process, broadcast
from d2m.families import family_of_model
from d2m.families.flow import generator_at, training_point
from d2m.families.inputs import transformer_inputs
from d2m.model.block_group import block_groups
from d2m.model.surgery import sparse_ffns
from d2m.recipe.recipe import Batches, Recipe

Pair = tuple[nn.Module, nn.Module]


def shard(
    student: nn.Module | None,
    teacher: nn.Module | None,
    recipe: Recipe,
    batches: Batches,
    crew: Crew,
) -> Pair:
    """(student, teacher), sharded over the processes of `crew`, both frozen and run once.

    student, teacher: whole, and left as they are, in the first process; the others give None.
    recipe: what it trains in any stage is float32; with precision "bfloat16" the rest is
    kept in bfloat16, and weights travel so. batches: as `d2m.distill.loop.distill` takes them.

    Where the two models share a tensor that no stage trains, they share its shard.
    """
    mesh = init_device_mesh(torch.device(crew.device).type, (crew.size,))
    facts = None
    if student is not None and teacher is not None:
        names = learnt_names(student, recipe)
        common = _common(student, teacher, set(names))
        facts = (_blueprint(student), _blueprint(teacher), names, common)
    ours, theirs, names, common = broadcast(crew, facts)
    pair = []
    for whole, (kind, config), trained in ((student, ours, set(names)), (teacher, theirs, set())):
        with torch.device("meta"):
            model = kind(**config).eval()
        frozen = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        kept = _routing(model)
        for name, parameter in model.named_parameters():
            wanted = torch.float32 if name in trained or name in kept else frozen
            parameter.data = parameter.data.to(wanted)
        model.requires_grad_(False)
        _wrap(model, mesh, kept, recipe.precision)
        pair.append((model, whole))
    (sharded_student, first), (sharded_teacher, second) = pair
    _load_values(sharded_teacher, second, crew, set())
    shares = dict(sharded_teacher.named_parameters())
    for name, other in common.items():
        place, _, leaf = name.rpartition(".")
        setattr(sharded_student.get_submodule(place), leaf, shares[other])
    _load_values(sharded_student, first, crew, set(common))
    for group in block_groups(sharded_student).values():
        group.any_process = lambda flags: any_process(crew, flags)
    _first_forward(sharded_student, names, recipe, batches, crew)
    return sharded_student, sharded_teacher


# ---------------------------------------------------------------- steps of `shard`


def _first_forward(
    student: nn.Module, names: Iterable[str], recipe: Recipe, batches: Batches, crew: Crew
) -> None:
    """Run the student once with everything that will ever learn marked so.

    FSDP settles at its first forward which dtype a block's gradients are reduced in, from the
    weights that learn then; a later stage may train a block that the first one does not.
    """
    for name in names:
        student.get_parameter(name).requires_grad_(True)
    batch = batch_rows(batches, 0, crew.size, (crew.rank, crew.rank + 1))
    noised = family_of_model(student).data.noised
    x, t = training_point(batch, generator_at(0, "wake"), recipe.t_mean, recipe.t_std, noised)
    inputs = transformer_inputs(student, batch, x, t)
    device = torch.device(crew.device).type
    half = recipe.precision == "bfloat16"
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
        student(**inputs)
    student.requires_grad_(False)


def _blueprint(model: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    """What a model is built from: its class and its config."""
    config: Mapping[str, Any] = model.config  # type: ignore[assignment]
    return type(model), {key: each for key, each in config.items() if not key.startswith("_")}


def _common(student: nn.Module, teacher: nn.Module, learnt_names: set[str]) -> dict[str, str]:
    """Names of the student's frozen parameters that are the teacher's, and the teacher's names."""
    places = {parameter.data_ptr(): name for name, parameter in teacher.named_parameters()}
    return {
        name: places[parameter.data_ptr()]
        for name, parameter in student.named_parameters()
        if parameter.data_ptr() in places and name not in learnt_names
    }


def _routing(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of gates and routers, by full name."""
    names = [f"{name}.gate" for name in sparse_ffns(model)]
    names += [f"{name}.router" for name in block_groups(model)]
    return {
        f"{name}.{leaf}": parameter
        for name in names
        for leaf, parameter in model.get_submodule(name).named_parameters()
    }


def _wrap(
    model: nn.Module, mesh: DeviceMesh, kept: Mapping[str, nn.Parameter], precision: str
) -> None:
    """`fully_shard` on every block and on the rest, in place."""
    size = mesh.size()
    mixed: dict[str, Any] = {}
    if precision == "bfloat16":
        mixed = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(**mixed, cast_forward_inputs=False),
        "ignored_params": set(kept.values()),
        "shard_placement_fn": lambda parameter: _placement(parameter.shape, size),
    }
    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def _placement(shape: torch.Size, size: int) -> Shard:
    """The first dimension that divides evenly; the first of all, padded, where none does.

    Experts are 12 and GPUs are 8: by its first dimension, [E, D, H] would leave 2 GPUs without any.
    """
    return Shard(next((i for i, length in enumerate(shape) if length % size == 0), 0))


def _load_values(model: nn.Module, whole: nn.Module | None, crew: Crew, done: set[str]) -> None:
    """Values of parameters and buffers, from the first process's whole model."""
    have = (
        {} if whole is None else {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in done:
            continue
        found = distributed(have.get(name), tensor.shape, tensor.dtype, tensor, crew)
        place, _, leaf = name.rpartition(".")
        module = model.get_submodule(place)
        if isinstance(tensor, nn.Parameter):
            setattr(module, leaf, nn.Parameter(found, requires_grad=False))
        else:
            module._buffers[leaf] = found
