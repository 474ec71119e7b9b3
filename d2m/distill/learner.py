"""What learns in a stage of distillation: parameters, AdamW, and the average that is its result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2m.distill.processes import ALONE, Crew
from d2m.families import family_of_model
from d2m.model.block_group import block_groups, set_kappa
from d2m.model.modulation import norms
from d2m.model.surgery import set_top_k, sparse_ffns
from d2m.recipe.recipe import PARTS, Recipe, Stage

BETAS = (0.9, 0.98)  # ours: short runs, so the second moment forgets sooner than at .999
LAST_RATE = 0.02  # ours: the cosine ends at this share of the stage's learning rate
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names for them


@dataclass
class Learner:
    """A stage under way. `average` is empty unless the stage asks for one.

    parameters: the student's; own: what of them this process moves, in the same memory, and has
    moments and an average of: themselves, or the parts of sharded ones.
    """

    stage: Stage
    parameters: dict[str, nn.Parameter]
    own: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    average: dict[str, Tensor]
    crew: Crew = ALONE


def trainable(student: nn.Module, stage: Stage) -> dict[str, nn.Parameter]:
    """The parameters that `stage.train` names, by full name, in the model's order.

    Words are `recipe.PARTS`. What no token or sample reaches in this stage is left out of the wide
    words "groups" and "blocks": routers and, with top_k 0, experts and gates.

    Raises:
        ValueError: an unknown word, nothing to train, or experts or routers that nothing reaches.
    """
    groups = block_groups(student)
    largest = max((len(group.blocks) for group in groups.values()), default=0)
    for word in stage.train:
        if word not in PARTS:
            raise ValueError(
                f"stage {stage.name!r} trains {word!r}; expected some of {', '.join(PARTS)}."
            )
        if word in ("experts", "gate") and stage.top_k == 0:
            raise ValueError(
                f"stage {stage.name!r} trains {word!r} with top_k 0, where no token reaches an "
                "expert; give it a top_k of 1 or more or take the word out of its train list."
            )
        if word == "router" and stage.kappa in (None, largest):
            raise ValueError(
                f"stage {stage.name!r} trains 'router' with kappa {stage.kappa}, where all blocks "
                "of a group run; give it a kappa that leaves some out, or take the word out."
            )
    words = _labels(student)
    asleep = {"router"} | ({"experts", "gate"} if stage.top_k == 0 else set())
    wide = {"groups", "blocks"}.intersection(stage.train)
    chosen = {
        name: parameter
        for name, parameter in student.named_parameters()
        if words[name].intersection(stage.train) - wide
        or (words[name] & wide and not words[name] & asleep)
    }
    if not chosen:
        raise ValueError(
            f"stage {stage.name!r} trains {list(stage.train)}, which names no parameter of this "
            "student; give it a sparse model and some of " + ", ".join(PARTS) + "."
        )
    return chosen


def learnt_names(student: nn.Module, recipe: Recipe) -> list[str]:
    """Full names of what the stages that are run train, sorted."""
    stages = [stage for stage in recipe.stages if not stage.skip]
    return sorted({name for stage in stages for name in trainable(student, stage)})


def _labels(student: nn.Module) -> dict[str, set[str]]:
    """Which of `recipe.PARTS` every parameter belongs to."""
    words: dict[str, set[str]] = {name: set() for name, _ in student.named_parameters()}
    lists = tuple(name + "." for _, name in family_of_model(student).blocks.kinds)
    groups = tuple(name + "." for name in block_groups(student))
    modulated = tuple(f"{name}." for name in (*norms(student), "modulation"))
    for site, module in sparse_ffns(student).items():
        for name, _ in module.named_parameters():
            words[f"{site}.{name}"].add(name.split(".")[0])
    for name, marks in words.items():
        if ".router." in name:
            marks.add("router")
        if name.startswith(lists):
            marks.add("blocks")
        if name.startswith(groups):
            marks.add("groups")
        if name.startswith(modulated):
            marks.add("adaln")
    return words


def unshare(student: nn.Module, teacher: nn.Module, names: Iterable[str]) -> None:
    """Give parameters that are to learn memory of their own where it is still the teacher's."""
    taken = {parameter.data_ptr() for parameter in teacher.parameters()}
    for name in names:
        parameter = student.get_parameter(name)
        if parameter.data_ptr() in taken:
            parameter.data = parameter.data.clone()


def start(
    student: nn.Module, stage: Stage, parameters: dict[str, nn.Parameter], crew: Crew = ALONE
) -> Learner:
    """Freeze the student but for `parameters`, set its knobs, and make a fresh optimizer."""
    student.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    set_top_k(student, stage.top_k)
    set_kappa(student, stage.kappa)
    _record(student, True)
    own = local_parts(parameters, crew)
    # fused: one pass over weights and moments; 3 ms a step instead of 8 (2.4 M weights, one core).
    optimizer = torch.optim.AdamW(
        _by_rate(student, own), betas=BETAS, weight_decay=stage.weight_decay, fused=True
    )
    average = {n: p.detach().clone() for n, p in own.items()} if stage.ema else {}
    return Learner(stage, parameters, own, optimizer, average, crew)


def local_parts(parameters: Mapping[str, Tensor], crew: Crew) -> dict[str, Tensor]:
    """What of every parameter this process holds, in the same memory."""
    if crew.size == 1:
        return dict(parameters)
    from d2m.distill.gather import local

    return {name: local(parameter) for name, parameter in parameters.items()}


def _by_rate(student: nn.Module, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """AdamW's parameter groups; `factor` is what a group's rate is multiplied with (ours).

    AdamW's steps do not grow with the weights. The experts' second matrix is stored times E, so
    that gates of 1/E weigh it as the dense one: at the common rate it would learn E times slower
    than what it stands for. A router's logit sums n inputs that hardly differ from sample to
    sample: a step of one sign on all of them moves every sample's logit alike, and one block takes
    them all, so its rate is n^-1/2 of the common one.
    """
    factors: dict[str, float] = {}
    for name, ffn in sparse_ffns(student).items():
        factors[f"{name}.experts.w2"] = float(ffn.num_experts)
    for name, group in block_groups(student).items():
        for part, weight in group.router.named_parameters():
            factors[f"{name}.router.{part}"] = weight.shape[1] ** -0.5
    groups: dict[float, list[Tensor]] = {1.0: []}
    for name, parameter in parameters.items():
        groups.setdefault(factors.get(name, 1.0), []).append(parameter)
    return [{"params": each, "factor": factor} for factor, each in groups.items() if each]


def _record(student: nn.Module, wanted: bool) -> None:
    """Let FFNs and groups keep their routers' logits, or stop; what they hold is dropped."""
    modules: list[Any] = [*sparse_ffns(student).values(), *block_groups(student).values()]
    for module in modules:
        module.record, module.last_logits = wanted, None


def learning_rate(stage: Stage, step: int) -> float:
    """The rate of step 0, 1, ...: a linear rise, then a cosine down to LAST_RATE of `stage.lr`."""
    rise = round(stage.warmup * stage.steps)
    if step < rise:
        return stage.lr * (step + 1) / rise
    way = (step - rise) / max(1, stage.steps - rise)
    return stage.lr * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * way)))


def update(learner: Learner, step: int) -> Tensor:
    """Clip the gradients, take AdamW's step number `step`, move the average; the gradient's norm.

    The norm is that before clipping; gradients are dropped afterwards.
    """
    stage, own = learner.stage, list(learner.own.values())
    for name, parameter in learner.parameters.items():
        if parameter.grad is None:  # of a block that no sample chose: a step like any other,
            parameter.grad = torch.zeros_like(parameter)  # so that all count the same steps
        if (local_part := learner.own[name]) is not parameter:
            local_part.grad, parameter.grad = parameter.grad.to_local(), None  # type: ignore[attr-defined]
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate(stage, step) * group["factor"]
    if learner.crew.size == 1:
        norm = nn.utils.clip_grad_norm_(own, stage.clip or math.inf)
    else:
        from d2m.distill.gather import clip_shared

        norm = clip_shared(learner.parameters, learner.own, stage.clip or math.inf, learner.crew)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    if learner.average:
        # A young average forgets faster, or it would keep its first value.
        decay = min(stage.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(learner.average.values()), own, 1 - decay)
    return norm


def finish(student: nn.Module, learner: Learner) -> None:
    """Put the average, if there is one, in the weights' place and stop recording logits."""
    copy_into(learner.average, learner.own)
    _record(student, False)


def state(learner: Learner) -> dict[str, Tensor]:
    """Moments and average as flat tensors: `exp_avg/NAME`, `exp_avg_sq/NAME`, `average/NAME`.

    AdamW's step count is not among them: it is the stage's.
    """
    tensors = {f"average/{name}": tensor for name, tensor in learner.average.items()}
    for name, parameter in learner.own.items():
        for moment in MOMENTS:
            if parameter in learner.optimizer.state:
                tensors[f"{moment}/{name}"] = learner.optimizer.state[parameter][moment]
    return tensors


def restore(learner: Learner, tensors: Mapping[str, Tensor], step: int) -> None:
    """Undo `state` after `step` steps of the stage."""
    copy_into(with_prefix(tensors, "average"), learner.average)
    first, second = (with_prefix(tensors, moment) for moment in MOMENTS)
    for name in first:
        parameter = learner.own[name]
        learner.optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),
            MOMENTS[0]: first[name].to(parameter.device),
            MOMENTS[1]: second[name].to(parameter.device),
        }


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors named `prefix/...`, without the prefix."""
    return {
        name.removeprefix(prefix + "/"): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix + "/")
    }


def copy_into(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy values by name, in place."""
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)
