"""Distillation by several processes: run by tests/d2m/distill/test_many_processes.py, and its cases
for one process.

Usage: python crewcase.py SIZE CASE WORKDIR. The first process prints the log's lines, or what ended
the run, as JSON; the exit code is the first process's.
"""

import json
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from d2m.cli.terminal import explain
from d2m.distill.learner import learnt_names
from d2m.distill.loop import distill
from d2m.distill.processes import ALONE, Crew, final_error, join, leave
from d2m.recipe.recipe import Recipe
from tests.tiny.pair import BLOCKS, EXPERTS, GROUPS, RECIPE, SHARED, grouped_pair, tiny_batches

BATCH = 8
STAGES = tuple(replace(each, batch_size=BATCH, steps=3) for each in (SHARED, EXPERTS, GROUPS))
EVERY = replace(STAGES[2], name="every", train=("blocks", "router"), ema=0.9, steps=2)
THREE = replace(RECIPE, stages=(*STAGES, EVERY), blocks=BLOCKS)
RECIPES = {
    "whole": THREE,
    "stop": THREE,
    "resume": THREE,
    "die": THREE,
    "bfloat16": replace(THREE, precision="bfloat16"),
}
STOP = ("stage groups", 2)  # in the middle of the stage whose blocks are chosen


def run(case: str, workdir: Path, crew: Crew = ALONE, **more: Any) -> tuple[Any, Any]:
    """(log, student or None) of a case; every step ends in a checkpoint where one is needed."""
    student, teacher = grouped_pair() if crew.leads else (None, None)
    recipe: Recipe = RECIPES[case]

    def progress(phase: str, step: int, steps: int) -> None:
        if case == "stop" and (phase, step) == STOP:
            os.kill(os.getpid(), signal.SIGINT)

    def batches(step: int, size: int) -> Any:
        if case == "die" and crew.rank == crew.size - 1 and step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return tiny_batches(step, size)

    options: dict[str, Any] = {"workdir": workdir, "seed": 3, "log_every": 1, "crew": crew} | more
    options |= {"resume": case == "resume", "save_seconds": 0 if case == "die" else 60}
    options |= {"log": lambda text: None, "progress": progress}
    return distill(student, teacher, recipe, batches, **options), student


def facts(crew: Crew) -> dict[str, Any]:
    """How two models lie on two processes, in bfloat16, where stage 3 is not trained."""
    from d2m.distill.gather import local
    from d2m.distill.sharding import shard

    recipe = replace(RECIPES["bfloat16"], stages=STAGES[:2])
    pair = grouped_pair() if crew.leads else (None, None)
    student, teacher = shard(*pair, recipe, tiny_batches, crew)
    ours = {name: local(p) for name, p in student.named_parameters()}
    theirs = {local(p).data_ptr() for p in teacher.parameters()}
    trained = learnt_names(student, recipe)
    name = next(name for name in trained if name.endswith("experts.w1"))
    sizes = [p.numel() / student.get_parameter(n).numel() for n, p in ours.items()]
    return {
        "shared": sorted(name for name, p in ours.items() if p.data_ptr() in theirs),
        "trained": trained,
        "dtypes": {name: str(p.dtype) for name, p in ours.items()},
        "halves": sum(size == 0.5 for size in sizes),
        "whole": sorted(name for name, p in ours.items() if p is student.get_parameter(name)),
        "experts": list(ours[name].shape),
    }


def worker(rank: int, size: int, case: str, workdir: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        crew = join()
        if case == "stop":
            print(json.dumps(facts(crew)), flush=True) if crew.leads else facts(crew)
        history, student = run(case, Path(workdir), crew)
        if student is not None:
            torch.save(dict(student.named_parameters()), Path(workdir) / "student.pt")
            print(json.dumps(history), flush=True)
        leave(crew)
    except (Exception, KeyboardInterrupt) as error:
        error, speaks = final_error(error)
        sentence, code = explain(error)
        if speaks:
            print(json.dumps(sentence), flush=True)
        os._exit(code)


if __name__ == "__main__":
    import accelerate  # noqa: F401
    import torch.distributed.tensor

    import d2m.distill.sharding  # noqa: F401

    grouped_pair()
    # Forked: what was imported until here is paid once.
    size, case, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.start_processes(
        worker, (size, case, workdir, port), nprocs=size, start_method="fork", join=False
    )
    for process in context.processes:
        process.join()
    sys.exit(context.processes[0].exitcode)
