"""Distillation: the student learns from its dense teacher, stage after stage, in one loop.

A stage is a row of the recipe: which parameters learn, how many experts a token uses, how long, how
fast, and which losses. Nothing random is kept between steps (draws come from seed, stage and step),
so a killed run goes on from its last checkpoint to the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m import checkpoint, learner, trainlog
from d2m.features import block_features, feature_errors, feature_names
from d2m.flow import generator_at, noisy
from d2m.inputs import transformer_inputs
from d2m.losses import balance_loss, choices, feature_loss, output_loss
from d2m.recipe import Recipe, to_dict
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
            encoder_hidden_states, pooled_projections, img_ids, txt_ids, and maybe guidance [B]. A
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
    groups = [learner.trainable(student, stage) for stage in recipe.stages]
    sites = sparse_ffns(student)
    names = feature_names(student)
    identity = _identity(student, recipe, seed)
    total = sum(stage.steps for stage in recipe.stages)

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
        learnt = {name: p for group in groups[: stage + 1] for name, p in group.items()}
        facts = {"done": done, "pending": pending, "seconds": time.monotonic() - started}
        trainlog.sync(log_file)
        checkpoint.save(
            folder,
            stage,
            step,
            {f"student/{name}": parameter.detach() for name, parameter in learnt.items()} | state,
            facts | {"identity": identity},
        )

    with _stop_on_signal() as stop_asked:
        for index in range(first, len(recipe.stages)):
            stage = recipe.stages[index]
            pupil = learner.start(student, stage, groups[index])
            learner.restore(pupil, tensors, step)
            window = {name: t.to(device) for name, t in learner.part(tensors, "window").items()}
            tensors = {}  # only the first stage of a resumed run has a past
            wanted = "feature" in stage.losses
            saved = time.monotonic()

            with block_features(student, wanted) as mine, block_features(teacher, wanted) as aims:
                while step < stage.steps:
                    draw = generator_at(seed, index, step)
                    batch = batches(done, stage.batch_size)
                    x, t, _ = noisy(batch["latents"], draw, recipe.t_mean, recipe.t_std)
                    inputs = transformer_inputs(teacher, batch, x, t)
                    with amp:
                        with torch.no_grad():
                            target = teacher(**inputs, return_dict=False)[0]
                        guess = student(**inputs, return_dict=False)[0]

                    terms, figures = {"output": output_loss(guess, target)}, {}
                    if wanted:
                        errors, norms, figures["features"] = feature_errors(mine, aims)
                        terms["feature"] = feature_loss(terms["output"], errors, norms)
                    if stage.top_k:
                        terms["balance"], figures["load"] = _balance(sites, stage.top_k)
                    loss = sum(weight * terms[name] for name, weight in stage.losses.items())
                    loss.backward()
                    figures["gradient"] = learner.update(pupil, step)

                    mine.clear()
                    aims.clear()
                    step, done, pending = step + 1, done + 1, pending + 1
                    trainlog.add(window, figures | terms | {"loss": loss})
                    if step % log_every == 0 or step == stage.steps:
                        line = trainlog.averages(window, pending, names, list(sites))
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
                        _interrupt(done, total, workdir, log)

            learner.finish(student, pupil)
            step = 0
            save(index + 1, step, {})
            if stop_asked():
                _interrupt(done, total, workdir, log)
    return history


def _balance(sites: Mapping[str, Any], top_k: int) -> tuple[Tensor, Tensor]:
    """Mean balance loss over the sparse FFNs, and every expert's choices [sites, E].

    FFNs of one shape go together: text and image streams differ in their number of tokens.
    """
    logits = [site.last_logits.flatten(0, -2) for site in sites.values()]
    losses: list[Tensor] = [torch.empty(0)] * len(logits)
    loads: list[Tensor] = [torch.empty(0)] * len(logits)
    for tokens in sorted({each.shape[0] for each in logits}):
        where = [i for i, each in enumerate(logits) if each.shape[0] == tokens]
        probabilities, counts = choices(torch.stack([logits[i] for i in where]), top_k)
        for i, loss, load in zip(where, balance_loss(probabilities, counts), counts):
            losses[i], loads[i] = loss, load
    for site in sites.values():
        site.last_logits = None  # or the step's graph would outlive it
    return torch.stack(losses).mean(), torch.stack(loads)


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


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C or SIGTERM came; a second one interrupts at once."""
    asked = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # Python lets only the main thread set handlers
        return
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, frame: object) -> None:
        asked.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in numbers:
            signal.signal(number, ask)
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(done: int, total: int, workdir: Path, log: Callable[[str], None]) -> None:
    """Say how to go on, and stop."""
    sentence = (
        f"stopped after {done} of {total} steps; the state is in {workdir}, go on with --resume."
    )
    log(sentence)
    raise KeyboardInterrupt(sentence)
