"""Distillation: the student learns from its dense teacher, stage after stage, in one loop.

A stage is a row of the recipe: which parameters learn, how many experts a token uses, how long, how
fast, and which losses. Nothing random is kept between steps (draws come from seed, stage and step),
so a killed run goes on from its last checkpoint to the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m import checkpoint, learner, trainlog
from d2m.features import block_features, feature_errors, feature_names, group_feature_names
from d2m.flow import generator_at, training_point
from d2m.grouping import dense_name
from d2m.groups import block_groups
from d2m.inputs import transformer_inputs
from d2m.losses import balance_loss, choices, feature_loss, group_balance_loss, output_loss
from d2m.recipe import Recipe, to_dict
from d2m.stopping import interrupt, stop_on_signal
from d2m.surgery import sparse_ffns

Batches = Callable[[int, int], Mapping[str, Tensor]]


def distill(
    student: nn.Module,
    teacher: nn.Module,
    recipe: Recipe,
    batches: Batches,
    *,
    seed: int = 0,
    workdir: str | os.PathLike[str],
    resume: bool = False,
    save_seconds: float = 60.0,
    log_every: int = 10,
    progress: Callable[[str, int, int], None] | None = None,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train `student` in place to match `teacher`, both on one device; master weights are float32.

    Args:
        student: a sparse FLUX transformer.
        teacher: the dense one, only run.
        batches: (step, batch size) -> dict of latents [B, T, C] (clean, packed), the transformer's
            encoder_hidden_states, pooled_projections, img_ids, txt_ids, and maybe guidance [B], or
            noisy [B, T, C] and time [B] where no noise is to be drawn (`flow.training_point`). A
            pure function of its arguments; `step` counts through all stages.
        workdir: gets `checkpoints/` (d2m.checkpoint) and `log.jsonl` (d2m.trainlog).
        resume: go on from the last whole checkpoint instead of starting from the beginning.
        save_seconds: time between checkpoints; 0 saves after every step.
        log_every: steps averaged in a line of the log.

    Returns the log, a dict per line.

    Raises:
        ValueError: a stage that cannot be run, a loss that is no number, or a resume under another
            recipe, seed or model.
        OSError: a checkpoint or the log cannot be written; the checkpoints before are whole.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written; its text says so.
    """
    workdir = Path(workdir)
    folder, log_file = workdir / "checkpoints", workdir / "log.jsonl"
    device = next(student.parameters()).device
    student.float().eval()
    teacher.eval().requires_grad_(False)
    if recipe.precision == "float32":
        teacher.float()
    amp = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")
    learning = [{} if stage.skip else learner.trainable(student, stage) for stage in recipe.stages]
    learner.unshare(student, teacher, {name for group in learning for name in group})
    sites, groups = sparse_ffns(student), block_groups(student)
    dense_sites = [dense_name(site) for site in sites]
    identity = _identity(student, recipe, seed)
    total = recipe.steps

    # Where we are: `step` steps into stage `first`, `done` in all, `pending` since the last line.
    first, step, done, pending, seconds = 0, 0, 0, 0, 0.0
    tensors: dict[str, Tensor] = {}
    if not resume:
        checkpoint.clear(folder)
    elif found := checkpoint.latest(folder, log):
        record, tensors = found
        facts, first, step = record["facts"], record["stage"], record["step"]
        _check_same(facts["identity"], identity, workdir)
        done, pending, seconds = facts["done"], facts["pending"], facts["seconds"]
        learner.copy_into(learner.part(tensors, "student"), dict(student.named_parameters()))
        log(f"resuming {workdir} after {done} of {total} steps.")
    else:
        log(f"{folder} holds no usable checkpoint; training starts from the beginning.")
    history = trainlog.rewind(log_file, done)
    started = time.monotonic() - seconds

    def save(stage: int, step: int, state: dict[str, Tensor]) -> None:
        """A checkpoint of `state` and of all weights that a stage until this one has trained."""
        learnt = {name: p for group in learning[: stage + 1] for name, p in group.items()}
        facts = {"done": done, "pending": pending, "seconds": time.monotonic() - started}
        trainlog.sync(log_file)
        checkpoint.save(
            folder,
            stage,
            step,
            {f"student/{name}": parameter.detach() for name, parameter in learnt.items()} | state,
            facts | {"identity": identity},
        )

    with stop_on_signal() as stop_asked:
        for index in range(first, len(recipe.stages)):
            stage = recipe.stages[index]
            if stage.skip:
                continue
            pupil = learner.start(student, stage, learning[index])
            learner.restore(pupil, tensors, step)
            window = {name: t.to(device) for name, t in learner.part(tensors, "window").items()}
            tensors = {}  # only the first stage of a resumed run has a past
            names, ends = feature_names(student), group_feature_names(student)
            if "feature" not in stage.losses:
                names = ends if "group" in stage.losses else []
            place = [names.index(name) for name in ends] if names else []
            past = sum(each.steps for each in recipe.stages[:index])  # batches of skipped ones too
            saved = time.monotonic()

            with block_features(student, names) as mine, block_features(teacher, names) as aims:
                while step < stage.steps:
                    draw = generator_at(seed, index, step)
                    batch = batches(past + step, stage.batch_size)
                    x, t = training_point(batch, draw, recipe.t_mean, recipe.t_std)
                    inputs = transformer_inputs(teacher, batch, x, t)
                    with amp:
                        with torch.no_grad():
                            target = teacher(**inputs, return_dict=False)[0]
                        guess = student(**inputs, return_dict=False)[0]

                    terms, figures = {"output": output_loss(guess, target)}, {}
                    if names:
                        errors, norms, figures["features"] = feature_errors(mine, aims, names)
                    if "feature" in stage.losses:
                        terms["feature"] = feature_loss(terms["output"], errors, norms)
                    if "group" in stage.losses:
                        ours = (errors[place], norms[place])
                        terms["group"] = feature_loss(terms["output"], *ours)
                    if stage.top_k:
                        terms["balance"], figures["load"] = _balance(sites, stage.top_k)
                    if stage.kappa is not None:
                        terms["group_balance"], used = _group_balance(groups)
                        figures |= {trainlog.GROUP + name: counts for name, counts in used.items()}
                    loss = sum(weight * terms[name] for name, weight in stage.losses.items())
                    loss.backward()
                    figures["gradient"] = learner.update(pupil, step)

                    mine.clear()
                    aims.clear()
                    step, done, pending = step + 1, done + 1, pending + 1
                    trainlog.add(window, figures | terms | {"loss": loss})
                    if step % log_every == 0 or step == stage.steps:
                        line = trainlog.averages(window, pending, names, dense_sites)
                        line |= {"stage": stage.name, "index": index, "step": step, "done": done}
                        line |= {"steps": stage.steps, "lr": learner.learning_rate(stage, step - 1)}
                        line |= {"seconds": round(time.monotonic() - started, 3)}
                        trainlog.append(log_file, line)
                        history.append(line)
                        window, pending = {}, 0
                    if progress:
                        progress(f"stage {stage.name}", step, stage.steps)

                    due = time.monotonic() - saved >= save_seconds
                    if step < stage.steps and (due or stop_asked()):
                        trainlog.check(window)  # never a checkpoint of a run that has gone wrong
                        state = {f"window/{name}": tensor for name, tensor in window.items()}
                        save(index, step, learner.state(pupil) | state)
                        saved = time.monotonic()
                    if step < stage.steps and stop_asked():
                        interrupt(done, total, workdir, log)

            learner.finish(student, pupil)
            step = 0
            save(index + 1, step, {})
            if stop_asked():
                interrupt(done, total, workdir, log)
    return history


def _balance(sites: Mapping[str, Any], top_k: int) -> tuple[Tensor, Tensor]:
    """Mean balance loss over the sparse FFNs, and every expert's choices [sites, E].

    FFNs of one shape go together: text and image streams differ in their number of tokens. FFNs of
    blocks that no sample chose have nothing to say in this step.
    """
    modules = list(sites.values())
    heard = [i for i, site in enumerate(modules) if site.last_logits is not None]
    logits = {i: modules[i].last_logits.flatten(0, -2) for i in heard}
    losses: list[Tensor] = []
    loads = [torch.zeros(site.num_experts, device=site.gate.weight.device) for site in modules]
    for tokens in sorted({each.shape[0] for each in logits.values()}):
        where = [i for i, each in logits.items() if each.shape[0] == tokens]
        probabilities, counts = choices(torch.stack([logits[i] for i in where]), top_k)
        losses.append(balance_loss(probabilities, counts))
        for i, load in zip(where, counts):
            loads[i] = load
    for site in modules:
        site.last_logits = None  # or the step's graph would outlive it
    return torch.cat(losses).mean(), torch.stack(loads)


def _group_balance(groups: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean balance loss over the groups that have a choice, and how often each window was taken."""
    logits = {name: group.last_logits for name, group in groups.items()}
    chosen = {name: each for name, each in logits.items() if each is not None}
    for group in groups.values():
        group.last_logits = None
    if not chosen:
        return torch.zeros(()), {}
    loss, counts = group_balance_loss(list(chosen.values()))
    return loss, dict(zip(chosen, counts))


def _identity(student: nn.Module, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What must be the same for a resume to mean anything, as JSON holds it."""
    shapes = {name: list(parameter.shape) for name, parameter in student.named_parameters()}
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    facts = {"recipe": to_dict(recipe), "seed": seed, "parameters": digest}
    return json.loads(json.dumps(facts))


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path) -> None:
    """Raise ValueError, naming what differs, unless two identities are equal."""
    for name in new:
        if old.get(name) != new[name]:
            raise ValueError(
                f"{workdir} holds a run with {name} {json.dumps(old.get(name))}, not "
                f"{json.dumps(new[name])}; resume with the same one, or start again without resume."
            )
