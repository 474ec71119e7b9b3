"""The processes of one run, as torchrun or accelerate starts them: who we are, and small talk.

One process is the ordinary case and talks to nobody: every function here returns what it was given.
Processes that torchrun or `accelerate launch` has started know each other by RANK and WORLD_SIZE;
the first one alone writes files, prints and reports. What is agreed on is small and travels between
CPUs (gloo); tensors of the model go the way their device has (NCCL on CUDA).
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# The first process prepares the student while the others wait. A process that dies is noticed at
# once, by its closed connections; this long waits only who waits for one that hangs.
TIMEOUT = datetime.timedelta(hours=2)
# In the text of errors of collectives whose peer is gone.
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")


@dataclass(frozen=True)
class Crew:
    """This process among `size` of them. `device`: what it computes on, "auto" when alone."""

    rank: int = 0
    size: int = 1
    device: str = "auto"

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


ALONE = Crew()


class ProcessLost(RuntimeError):
    """Another process of the run ended without a message (killed?); its text says so."""


def from_environment() -> Crew:
    """Who the environment says we are, before anything is joined; no torch is imported."""
    try:
        rank, size = (int(os.environ.get(name, "")) for name in ("RANK", "WORLD_SIZE"))
    except ValueError:
        return ALONE
    return Crew(rank, size) if 0 <= rank < size and size > 1 else ALONE


def join() -> Crew:
    """Meet the other processes; ALONE where none were started.

    Raises ImportError where accelerate or a torch with distributed support is missing.
    """
    found = from_environment()
    if found.size == 1:
        return ALONE
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    # What the launcher set up for accelerate decides the device, as in any program on accelerate.
    return Crew(found.rank, found.size, str(PartialState(cpu=not cuda).device))


def leave(crew: Crew) -> None:
    """Part from the others, at the good end of a run."""
    if crew.size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


# ---------------------------------------------------------------- small talk


def mean(crew: Crew, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors' means over all processes, float32 and detached; alone: the tensors themselves.

    Every process gives the same shapes. One message, and nothing waits for the device.
    """
    if crew.size == 1:
        return list(tensors)
    import torch
    import torch.distributed as dist

    if not tensors:
        return []
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    pieces = (flat / crew.size).split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors)]


def any_process(crew: Crew, flags: Sequence[bool]) -> list[bool]:
    """Which of the flags are set in any process."""
    if crew.size == 1:
        return list(flags)
    import torch
    import torch.distributed as dist

    raised = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def broadcast(crew: Crew, what: Any = None) -> Any:
    """What the first process says, in all of them; `what` of the others is not looked at."""
    if crew.size == 1:
        return what
    import torch.distributed as dist

    box = [what if crew.leads else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# ---------------------------------------------------------------- endings


def final_error(error: BaseException) -> tuple[BaseException, bool]:
    """(the error that ends this process, whether this is the one that tells it).

    Of the processes that one launcher started on a machine, the first one that ends tells why; a
    process that only saw a connection close gives way to one with an error of its own, which came
    first, and else says that another process was lost.
    """
    me = from_environment()
    if me.size == 1:
        return error, True
    text = str(error)
    lost = isinstance(error, RuntimeError) and any(sign in text for sign in PEER_GONE)
    parent, port = os.getppid(), os.environ.get("MASTER_PORT", "")
    claim = Path(tempfile.gettempdir()) / f"d2m-ended-{parent}-{port}.txt"
    try:
        with open(claim, "x", encoding="utf-8") as file:
            file.write(f"process {me.rank}: {text}\n")
    except FileExistsError:
        return error, False
    if lost:
        return ProcessLost(
            f"one of the {me.size} processes ended without a message (killed, or out of "
            "memory?), so all stop; continue with --resume."
        ), True
    return error, True
