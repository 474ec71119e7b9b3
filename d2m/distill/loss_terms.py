"""What a step of distillation learns from: the terms of the loss, and figures for the log.

A step's batch may be spread over processes. A loss here is of this process's samples, scaled so
that the mean of all processes' losses is the whole batch's, as their mean gradient then is; what
weighs it (the features' weights, the load of experts) and the figures are of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2m.distill.features import feature_errors, feature_names, group_feature_names
from d2m.distill.log import GROUP
from d2m.distill.losses import balance_loss, choices, feature_loss, group_balance_loss, output_loss
from d2m.distill.processes import Crew, mean
from d2m.model.block_group import block_groups
from d2m.model.surgery import sparse_ffns
from d2m.recipe.recipe import Stage


@dataclass(frozen=True)
class View:
    """What of a student the terms of one stage look at.

    names: features, of which those at `place` are what groups put out; sites: sparse FFNs.
    """

    names: list[str]
    place: list[int]
    sites: Mapping[str, Any]
    groups: Mapping[str, Any]


def view(student: nn.Module, stage: Stage) -> View:
    """What the terms of `stage` need; the student's knobs are set."""
    names, ends = feature_names(student), group_feature_names(student)
    if "feature" not in stage.losses:
        names = ends if "group" in stage.losses else []
    place = [names.index(name) for name in ends] if names else []
    return View(names, place, sparse_ffns(student), block_groups(student))


def terms(
    stage: Stage,
    prediction: Tensor,
    target: Tensor,
    features: tuple[dict[str, Tensor], dict[str, Tensor]],
    seen: View,
    crew: Crew,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss to descend, figures): figures are of the whole batch, `loss` and its terms among them.

    Args:
        prediction, target: the student's and the teacher's output.
        features: both models' as `block_features` catches them.
        mask [B, L]: true for the tokens of the text that count; None: all do.

    The routers' logits that the student's modules hold are taken out of them.
    """
    own: dict[str, Tensor] = {"output": output_loss(prediction, target)}
    figures: dict[str, Tensor] = {}
    if seen.names:
        errors, norms, powers = feature_errors(*features, seen.names, mask)
        output, all_errors, squares, powers = mean(
            crew, [own["output"], errors, norms.square(), powers]
        )
        all_norms = squares.sqrt()
        figures["features"] = all_errors.detach() / powers.clamp_min(1e-30)
        if "feature" in stage.losses:
            own["feature"] = feature_loss(output, all_errors, all_norms, errors)
        if "group" in stage.losses:
            at = seen.place
            own["group"] = feature_loss(output, all_errors[at], all_norms[at], errors[at])
    if stage.top_k:
        own["balance"], figures["load"] = _balance(seen.sites, stage.top_k, crew)
    if stage.kappa is not None:
        own["group_balance"], used = _group_balance(seen.groups, crew)
        figures |= {GROUP + name: counts for name, counts in used.items()}
    loss: Any = sum(weight * own[name] for name, weight in stage.losses.items())
    averages = dict(zip((*own, "loss"), mean(crew, [*own.values(), loss])))
    return loss, figures | averages


def drop_logits(seen: View) -> None:
    """Drop logits that a repeated forward pass has left in the modules, with their graph."""
    for module in (*seen.sites.values(), *seen.groups.values()):
        module.last_logits = None


def _balance(sites: Mapping[str, Any], top_k: int, crew: Crew) -> tuple[Tensor, Tensor]:
    """Mean balance loss over the sparse FFNs, and every expert's choices [sites, E].

    FFNs of one shape go together: text and image streams differ in their number of tokens. FFNs of
    blocks that no sample chose have nothing to say in this step.
    """
    modules = list(sites.values())
    heard = [i for i, site in enumerate(modules) if site.last_logits is not None]
    logits = {i: modules[i].last_logits.flatten(0, -2) for i in heard}
    for site in modules:
        site.last_logits = None  # or the step's graph would outlive it
    loads = [torch.zeros(site.num_experts, device=site.gate.weight.device) for site in modules]
    found: list[tuple[list[int], Tensor, Tensor]] = []
    for tokens in sorted({each.shape[0] for each in logits.values()}):
        where = [i for i, each in logits.items() if each.shape[0] == tokens]
        probabilities, counts = choices(torch.stack([logits[i] for i in where]), top_k)
        found.append((where, probabilities, counts))
        for i, load in zip(where, counts):
            loads[i] = load
    load = torch.stack(loads)
    if crew.size == 1:
        losses = [balance_loss(probabilities, counts) for _, probabilities, counts in found]
        return torch.cat(losses).mean(), load
    # Processes had different numbers of tokens where blocks were chosen: each counts by its own.
    (all_loads,) = mean(crew, [load])
    tokens_of_all = all_loads.sum(-1)
    total = torch.zeros((), device=load.device)
    for where, probabilities, counts in found:
        share = counts.sum(-1) / tokens_of_all[where]
        total = total + (share * balance_loss(probabilities, all_loads[where])).sum()
    return total / (tokens_of_all > 0).sum(), all_loads


def _group_balance(groups: Mapping[str, Any], crew: Crew) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean balance loss over the groups that have a choice, and how often each window was taken."""
    logits = {name: group.last_logits for name, group in groups.items()}
    chosen = {name: each for name, each in logits.items() if each is not None}
    for group in groups.values():
        group.last_logits = None
    if not chosen:
        return torch.zeros(()), {}
    loss, counts = group_balance_loss(list(chosen.values()), lambda own: mean(crew, own))
    return loss, dict(zip(chosen, counts))
