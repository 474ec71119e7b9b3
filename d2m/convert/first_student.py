"""The student before its first training step, from the dense model or an earlier conversion."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.families import Family, family_of
from d2m.recipe.recipe import Batches, Progress, Recipe
from d2m.shards import IMPORTANCE
from runtime.files.atomic import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn


KNOBS = ("top_k", "kappa")  # fields of the config that may differ between a start and a recipe
GROUPING = ("groups", "alpha", "drop")  # and those that may where the start has all of its blocks


def first_student(
    dense: nn.Module,
    neurons: Mapping[str, Tensor],
    recipe: Recipe,
    family: Family,
    calibration: Batches,
    work: Path,
    start: Path | None = None,
) -> tuple[nn.Module, float]:
    """The sparse model that training begins with, and the conversion's own check.

    Args:
        neurons: importance of the dense model's neurons, site name -> [N].
        calibration: (step, batch size) -> batch; for the check, and for the fits of shared
            modulation, of routers and of experts, which are kept in `work`.
        start: a sparse pipeline directory whose weights are taken instead, of this structure or
            of one that has neither groups nor dropped blocks yet.

    The check is the relative error of the output, on real data, with all experts and blocks on and
    the dense model's modulation: rounding alone. ValueError if `start` has another structure.
    """
    from d2m.convert.experts_fit import fit_experts, is_fitted
    from d2m.convert.modulation_fit import compress_adaln, modulation_moments
    from d2m.convert.router_fit import spread_routers
    from d2m.families.flow import generator_at
    from d2m.families.inputs import noised, transformer_inputs
    from d2m.model.grouping import renamed
    from d2m.model.sparse_transformer import sparse_model_of
    from d2m.model.surgery import identity_error

    student: nn.Module = sparse_model_of(dense, neurons, recipe, family)
    if recipe.blocks.grouped:  # while the modulation is the dense model's
        fitted = compute_once(
            work / "routers.safetensors",
            lambda: spread_routers(student, calibration, recipe, recipe.seed),
        )
        for name, weight in fitted.items():
            student.get_parameter(name).data.copy_(weight)
    if is_fitted(recipe) and start is None:  # a start has learnt what becomes of them
        fitted = compute_once(
            work / "experts.safetensors",
            lambda: fit_experts(dense, neurons, calibration, recipe, family),
        )
        student.load_state_dict(renamed(fitted, recipe.blocks, family), strict=False)
    batch = calibration(0, 2)
    x, t, _ = noised(dense, batch, generator_at(0, "identity"))
    error = identity_error(student, dense, transformer_inputs(dense, batch, x, t))
    if recipe.adaln.mode != "full":
        moments = compute_once(
            work / "modulation.safetensors",
            lambda: modulation_moments(dense, calibration, recipe, recipe.seed),
        )
        compress_adaln(student, recipe.adaln, moments)
    return (student if start is None else _load_start(start, student, recipe, family)), error


def start_importance(start: Path) -> Callable[..., dict[str, Tensor]]:
    """The `importance` of a conversion that begins with `start`: the scores that one was split by.

    FileNotFoundError or ValueError, in one sentence, if `start` is no sparse pipeline of d2m.
    """
    from safetensors.torch import load_file

    family_of(start)
    if not (start / IMPORTANCE).is_file():
        raise FileNotFoundError(
            f"{start} has no {IMPORTANCE}; expected a sparse pipeline that d2m convert has written."
        )
    return lambda *args, **options: load_file(start / IMPORTANCE)


def neuron_scores(
    work: Path,
    identity: Mapping[str, Any],
    dense: nn.Module,
    calibration: Batches,
    recipe: Recipe,
    importance: Callable[..., dict[str, Tensor]],
    progress: Progress | None,
) -> dict[str, Tensor]:
    """The neurons' scores, from the work directory if they were computed before.

    They are the first thing worth keeping: the work directory is made here and not sooner, so that
    input which cannot be converted leaves nothing behind.
    """

    def scores() -> dict[str, Tensor]:
        found = importance(dense, calibration, recipe, seed=recipe.seed, progress=progress)
        write_json(work / "run.json", identity)
        return found

    return compute_once(work / IMPORTANCE, scores)


def _load_start(start: Path, student: nn.Module, recipe: Recipe, family: Family) -> nn.Module:
    """The student with the float32 weights of `start`, once their structures are seen to agree.

    A start without groups has every block that groups are made of: stages 1 and 2 run all blocks,
    so one run of them can be the start of several structures.
    """
    import torch

    from d2m.model.components import check_weights
    from d2m.model.grouping import renamed
    from d2m.model.sparse_transformer import sparse_class

    check_weights(start / "transformer", sparse_class(family))
    loaded: Any = sparse_class(family).from_pretrained(
        start / "transformer", torch_dtype=torch.float32, local_files_only=True
    )
    configs: list[Any] = [loaded.config, student.config]
    before, now = (
        json.loads(json.dumps({k: v for k, v in each.items() if not k.startswith("_")}))
        for each in configs
    )
    whole = not before.get("groups") and not before.get("drop")
    free = (*KNOBS, *GROUPING) if whole else KNOBS
    for name, value in now.items():
        if name not in free and before.get(name) != value:
            raise ValueError(
                f"{start} has {name} {before.get(name)!r} where the recipe makes {value!r}; start "
                "from a conversion of the same structure."
            )
    # Only what differs is taken: the rest stays shared with the dense model. Copies lie where a
    # training run's tensors lie, or kernels would round differently than in a run of all stages.
    state = loaded.state_dict()
    if whole:
        state = renamed(state, recipe.blocks, family)
    tensors = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    for name, tensor in tensors.items():
        value = state.get(name)
        if value is not None and not torch.equal(value, tensor.cpu()):
            tensor.data = value.to(tensor.device, copy=True)
    return student


def compute_once(path: Path, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in `path`, computed and put there at once where it is missing."""
    from safetensors.torch import load_file

    from d2m.shards import write_shard

    if not path.is_file():
        write_shard(path, compute())
    return load_file(path)
