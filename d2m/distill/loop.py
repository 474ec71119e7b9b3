"""Distillation: the student learns from its dense teacher, stage after stage, in one loop.

A stage is a row of the recipe: which parameters learn, how many experts a token uses, how long, how
fast, and which losses. Nothing random is kept between steps (noise is made from seed, stage and
step), so a killed run goes on from its last checkpoint to the same bits.

The same loop runs in one process and in many (d2m.distill.processes, d2m.distill.sharding): there
each has its rows of every batch and its part of every weight, and the first one alone keeps the
files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m.distill import checkpoint, learner
from d2m.distill import log as trainlog
from d2m.distill.activations import blocks_of, checkpointed
from d2m.distill.batch_rows import batch_rows, check_shares, shares
from d2m.distill.features import block_features, without_padding
from d2m.distill.loss_terms import drop_logits, terms, view
from d2m.distill.processes import ALONE, Crew, any_process, broadcast
from d2m.distill.stopping import interrupt, stop_on_signal
from d2m.families import family_of_model
from d2m.families.flow import generator_at, training_point
from d2m.families.inputs import prediction, transformer_inputs
from d2m.model.block_group import text_mask
from d2m.model.grouping import dense_name
from d2m.model.surgery import sparse_ffns
from d2m.recipe.recipe import Batches, Recipe


def distill(
    student: nn.Module | None,
    teacher: nn.Module | None,
    recipe: Recipe,
    batches: Batches,
    *,
    seed: int = 0,
    workdir: str | os.PathLike[str],
    resume: bool = False,
    save_seconds: float = 60.0,
    log_every: int = 10,
    crew: Crew = ALONE,
    parts: int = 1,
    checkpointing: bool = False,
    offload: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train `student` in place to match `teacher`, both on one device; master weights are float32.

    Args:
        student: a sparse FLUX transformer.
        teacher: the dense one, only run.
        batches: (step, batch size) -> dict of latents [B, T, C] (clean, packed), the transformer's
            encoder_hidden_states, pooled_projections, img_ids, txt_ids, and maybe guidance [B], or
            noisy [B, T, C] and time [B] where no noise is to be added (`flow.training_point`). A
            pure function of its arguments; `step` counts through all stages.
        workdir: gets `checkpoints/` (d2m.distill.checkpoint) and `log.jsonl` (d2m.distill.log).
        resume: go on from the last whole checkpoint instead of starting from the beginning.
        save_seconds: time between checkpoints; 0 saves after every step.
        log_every: steps averaged in a line of the log.
        crew: the processes of the run, as `d2m.distill.processes.join` finds them. The first one
            has both models, on the CPU or its device, and `student` is trained there in place; the
            others give None for both. All call with the same arguments otherwise.
        parts: of a process's rows of a batch, run one after another (gradient accumulation).
        checkpointing, offload: as in `d2m.distill.activations.checkpointed`; offload implies
            checkpointing.

    Returns the log, a dict per line.

    Raises:
        ValueError: a stage that cannot be run, a batch that cannot be divided, a loss that is no
            number, or a resume under another recipe, seed or model.
        OSError: a checkpoint or the log cannot be written; the checkpoints before are whole.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written; its text says so.
        RuntimeError: another process is gone; `d2m.distill.processes.final_error` makes it one
            sentence.
    """
    workdir = Path(workdir)
    check_shares(recipe, crew, parts)
    run = _Run(recipe, batches, seed, workdir, resume, save_seconds, log_every, crew, parts)
    blocks_again = checkpointing or offload
    if crew.size == 1:
        assert student is not None and teacher is not None
        with checkpointed(blocks_of(student) if blocks_again else [], offload):
            return _train(student, teacher, run, progress, log)
    from d2m.distill.gather import collect
    from d2m.distill.sharding import shard

    active, master = shard(student, teacher, recipe, batches, crew)
    with checkpointed(blocks_of(active) if blocks_again else [], offload):
        history = _train(active, master, run, progress, log)
    collect(active, student, learner.learnt_names(active, recipe))
    return history


@dataclass(frozen=True)
class _Run:
    """The arguments of `distill`, but for the models."""

    recipe: Recipe
    batches: Batches
    seed: int
    workdir: Path
    resume: bool
    save_seconds: float
    log_every: int
    crew: Crew
    parts: int


def _train(
    student: nn.Module,
    teacher: nn.Module,
    run: _Run,
    progress: Callable[[str, int, int], None] | None,
    log: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The loop of every process; `student` and `teacher` are whole or sharded."""
    recipe, crew, workdir, seed = run.recipe, run.crew, run.workdir, run.seed
    folder, log_file = workdir / "checkpoints", workdir / "log.jsonl"
    device = next(student.parameters()).device
    # eval: dropout, where a family has any, is a difference from the teacher that nobody can learn.
    student.eval()
    teacher.eval().requires_grad_(False)
    if crew.size == 1:  # shards have the precision they were made in
        student.float()
        if recipe.precision == "float32":
            teacher.float()
    amp = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")
    # All stages at once, before the first step: a word that names nothing to train is an error now
    # and not after hours, and what any stage will move stops being the teacher's memory.
    learning = [{} if stage.skip else learner.trainable(student, stage) for stage in recipe.stages]
    learner.unshare(student, teacher, {name for group in learning for name in group})
    dense_sites = [dense_name(site) for site in sparse_ffns(student)]
    identity = checkpoint.identity(student, recipe, seed)
    total, calls = recipe.steps, family_of_model(teacher).data

    # Where we are: `step` steps into stage `first`, `done` in all, `pending` since the last line.
    first, step, done, pending, seconds = 0, 0, 0, 0, 0.0
    record, tensors = _found(run, student, identity, log)
    if record:
        facts, first, step = record["facts"], record["stage"], record["step"]
        done, pending, seconds = facts["done"], facts["pending"], facts["seconds"]
        # Weights of the stages before and of this one; moments and averages when the stage starts.
        own = learner.local_parts(dict(student.named_parameters()), crew)
        learner.copy_into(learner.with_prefix(tensors, "student"), own)
        if crew.leads:
            log(f"resuming {workdir} after {done} of {total} steps.")
    # Lines after the checkpoint are of steps that are taken again.
    history = trainlog.rewind(log_file, done) if crew.leads else []
    started = time.monotonic() - seconds

    def save(stage: int, step: int, state: dict[str, Tensor]) -> None:
        """A checkpoint of `state` and of all weights that a stage until this one has trained."""
        learnt = {name: p for group in learning[: stage + 1] for name, p in group.items()}
        facts = {"done": done, "pending": pending, "seconds": time.monotonic() - started}
        own = learner.local_parts(learnt, crew)
        state = {f"student/{name}": part.detach() for name, part in own.items()} | state
        if crew.leads:  # before the checkpoint: a log may run ahead of it, never behind
            trainlog.sync(log_file)
        if crew.size == 1:
            checkpoint.save(folder, stage, step, state, facts | {"identity": identity})
        else:
            from d2m.distill.gather import save as save_shards

            save_shards(folder, stage, step, state, facts | {"identity": identity}, student, crew)

    with stop_on_signal() as stop_asked:
        for index in range(first, len(recipe.stages)):
            stage = recipe.stages[index]
            if stage.skip:
                continue
            active = learner.start(student, stage, learning[index], crew)
            learner.restore(active, tensors, step)
            window = learner.with_prefix(tensors, "window")
            window = {name: tensor.to(device) for name, tensor in window.items()}
            tensors = {}  # only the first stage of a resumed run has a past
            seen = view(student, stage)
            past = sum(each.steps for each in recipe.stages[:index])  # batches of skipped ones too
            saved = time.monotonic()

            catch = [block_features(model, seen.names) for model in (student, teacher)]
            with catch[0] as features, catch[1] as wanted, without_padding(student):
                while step < stage.steps:
                    # Every part of the batch takes its rows of the same noise, so the step is the
                    # same however many processes and parts share it.
                    for rows in shares(stage.batch_size, crew, run.parts):
                        generator = generator_at(seed, index, step)
                        batch = batch_rows(run.batches, past + step, stage.batch_size, rows)
                        place = (rows[0], stage.batch_size)
                        x, t = training_point(
                            batch, generator, recipe.t_mean, recipe.t_std, calls.noised, place
                        )
                        inputs = transformer_inputs(teacher, batch, x, t)
                        with amp:
                            with torch.no_grad():
                                answer = teacher(**inputs, return_dict=False)[0]
                            own = student(**inputs, return_dict=False)[0]
                        target, predicted = (prediction(teacher, y, x) for y in (answer, own))
                        # Outside autocast: losses are float32 whatever the passes ran in.
                        mask = text_mask(inputs)
                        both = features, wanted
                        loss, figures = terms(stage, predicted, target, both, seen, crew, mask)
                        (loss / run.parts).backward()
                        features.clear()  # or the graph of this part would live on into the next
                        wanted.clear()
                        drop_logits(seen)
                        trainlog.add(window, {n: each / run.parts for n, each in figures.items()})
                    trainlog.add(window, {"gradient": learner.update(active, step)})

                    step, done, pending = step + 1, done + 1, pending + 1
                    if step % run.log_every == 0 or step == stage.steps:
                        line = trainlog.averages(window, pending, seen.names, dense_sites)
                        line |= {"stage": stage.name, "index": index, "step": step, "done": done}
                        line |= {"steps": stage.steps, "lr": learner.learning_rate(stage, step - 1)}
                        line |= {"seconds": round(time.monotonic() - started, 3)}
                        if crew.leads:
                            trainlog.append(log_file, line)
                        history.append(line)
                        window, pending = {}, 0
                    if progress and crew.leads:
                        progress(f"stage {stage.name}", step, stage.steps)

                    # One process's clock or signal decides for all: a checkpoint is a meeting, and
                    # one that stopped alone would leave the others waiting.
                    due = crew.leads and time.monotonic() - saved >= run.save_seconds
                    due, stop = any_process(crew, [due, stop_asked()])
                    if step < stage.steps and (due or stop):
                        trainlog.check(window)  # never a checkpoint of a run that has gone wrong
                        state = {f"window/{name}": tensor for name, tensor in window.items()}
                        save(index, step, learner.state(active) | state)
                        saved = time.monotonic()
                    if step < stage.steps and stop:
                        interrupt(done, total, workdir)

            # The end of a stage is the beginning of the next in a checkpoint: no moments, no
            # window, and weights that are the stage's average where it has one.
            learner.finish(student, active)
            step = 0
            save(index + 1, step, {})
            if any_process(crew, [stop_asked()])[0]:
                interrupt(done, total, workdir)
    return history


def _found(
    run: _Run, student: nn.Module, identity: Mapping[str, Any], log: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checkpoint to go on from: (record, this process's tensors), ({}, {}) to begin with."""
    record: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    folder = run.workdir / "checkpoints"
    if run.crew.leads:
        if not run.resume:
            checkpoint.clear(folder)
        elif found := checkpoint.latest(folder, log):
            record, tensors = found
            checkpoint.check_same(record["facts"]["identity"], identity, run.workdir)
        else:
            log(f"{folder} holds no usable checkpoint; training starts from the beginning.")
    if run.crew.size > 1:
        from d2m.distill.gather import distributed_state

        record = broadcast(run.crew, record)
        tensors = distributed_state(tensors, student, run.crew)
    return record, tensors
