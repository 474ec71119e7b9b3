"""The training loop of every stage: AdamW, an average of the weights, a log, checkpoints.

A stage leaves NAME.safetensors (see state.py) and NAME.jsonl, one row per 50 steps, in the work
directory. Nothing random is saved: what is random in a step depends on the seed and the step alone.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scripts.teacher.state import gather, load_state, restore, save_state

# Step -> (loss, figures for the log). Depends on nothing but the weights and the step.
Loss = Callable[[int], tuple[Tensor, dict[str, float]]]
LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class Run:
    """What all stages of one run share."""

    work: Path  # checkpoints and logs
    device: str
    seed: int
    batch: int  # scenes per step of the transformer's stages
    bf16: bool  # autocast
    compile: bool  # the transformer's blocks
    save_every: float  # seconds between checkpoints; the end of a stage always writes one
    rank: int = 0  # of this process among those that share every step of a transformer's stage
    workers: int = 1

    def own_rows(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch that is the same in all processes.

        What a step learns from then depends on the seed and the step, not on how many share it.
        """
        return batch[self.rank :: self.workers]

    def generator(self, factor: int, step: int) -> torch.Generator:
        """A CPU generator of one step's own; the factor (a large number) keeps stages apart."""
        return torch.Generator().manual_seed(factor * self.seed + step)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 autocast, or nothing where the run is in float32."""
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16)


def train(
    run: Run,
    name: str,
    model: nn.Module,
    loss_of: Loss,
    *,
    steps: int,
    lr: float,
    warmup: int = 100,
    decay_share: float = 0.3,
    ema_decay: float = 0.0,
    compile_blocks: bool = False,
    snapshot: Callable[[nn.Module], None] | None = None,
    snapshot_every: int = 0,
) -> nn.Module:
    """Train `model` in place, from the stage's checkpoint where there is one.

    Args:
        name: of the stage and its files.
        lr, warmup, decay_share: see `learning_rate`.
        ema_decay: of the exponential average of the weights; 0 keeps none.
        compile_blocks: compile a diffusers model's repeated blocks (1.7x on a CPU core).
        snapshot: called with the average every `snapshot_every` steps (0: never).

    Returns:
        The average, or the model itself where none is kept, in eval mode.
    """
    path = run.work / f"{name}.safetensors"
    ema = copy.deepcopy(model).requires_grad_(False) if ema_decay else None
    result = model if ema is None else ema
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    first = 0
    if path.exists():
        tensors, meta = load_state(path)
        restore(tensors, model, ema, optimizer)
        first = meta["step"]
    if compile_blocks:  # after the average's deep copy, which has to be of plain modules
        model.compile_repeated_blocks(dynamic=False)

    started = saved = time.time()
    losses: list[float] = []
    for step in range(first, steps):
        rate = learning_rate(step, steps, lr, warmup, decay_share)
        loss, figures = loss_of(step)
        loss.backward()
        mean_of_workers(run, model)
        update(model, ema, optimizer, rate, min(ema_decay, (1 + step) / (10 + step)))
        losses.append(loss.item())
        done = step + 1
        if run.rank:  # the first process alone writes
            continue
        if done % LOG_EVERY == 0 or done == steps:
            elapsed = time.time() - started
            left = elapsed / (done - first) * (steps - done)
            mean = round(sum(losses) / len(losses), 6)
            append(run.work / f"{name}.jsonl", {"step": done, "loss": mean, "lr": rate} | figures)
            print(
                f"{name} {done}/{steps} loss {mean:.5f} {figures} "
                f"elapsed {elapsed:.0f}s left {left:.0f}s",
                flush=True,
            )
            losses = []
        if time.time() - saved > run.save_every or done == steps:
            save_state(path, gather(model, ema, optimizer), {"step": done})
            saved = time.time()
        if snapshot and snapshot_every and done % snapshot_every == 0:
            snapshot(result)
    return result.eval()


def learning_rate(step: int, steps: int, lr: float, warmup: int, decay_share: float) -> float:
    """The rate of step 0, 1, ...: a linear rise over `warmup` steps, `lr`, a linear fall to zero.

    The fall takes the last `decay_share` of the steps.
    """
    return lr * min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay_share * steps))


def update(
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    rate: float,
    keep: float,
) -> None:
    """One step of the optimizer at `rate`; the average keeps the share `keep` of itself."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ema is not None:
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - keep)


def mean_of_workers(run: Run, model: nn.Module) -> None:
    """Average the gradients over all processes, in one message."""
    if run.workers == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= run.workers
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def append(log: Path, row: dict[str, Any]) -> None:
    """Add one row to a stage's log. A resumed run writes the rows after its checkpoint again."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
