"""`python ...` in a process of its own that does not pay for the libraries' imports.

A server imports torch, diffusers and transformers once, nothing of ours, and forks a process for
every call: with its own arguments, environment, directory and exit code, and to be killed like any.
What a test says of imports, of a hash seed or of OpenMP's settings needs subprocess.run.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (
    "accelerate",
    "diffusers.pipelines.flux.pipeline_flux",
    "torch.distributed.tensor",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
)


def python(
    *arguments: object,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 1200,
) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` (-m MODULE ..., -c CODE ... or FILE ...) ends with.

    env: variables besides this process's. The process leads a session of its own, whose processes
    end with it. TimeoutExpired after `timeout` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    row = [str(each) for each in arguments]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("out", "error")]
        given = (row, str(cwd), {**os.environ, **(env or {})}, [str(path) for path in said])
        process = context.Process(target=_run, args=given)
        process.start()
        process.join(timeout)
        code = process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        if code is None:
            raise subprocess.TimeoutExpired(row, timeout)
        out, error = (path.read_text("utf-8") if path.is_file() else "" for path in said)
    return subprocess.CompletedProcess(row, code, out, error)


def _run(row: Sequence[str], cwd: str, environment: Mapping[str, str], said: Sequence[str]) -> None:
    """In the new process."""
    os.setsid()
    for number, path in enumerate(said, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # by this environment's TMPDIR
    if threads := environment.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path]
    try:
        if row[0] == "-m":
            sys.argv = list(row[1:])
            sys.path.insert(0, cwd)
            runpy.run_module(row[1], run_name="__main__", alter_sys=True)
        elif row[0] == "-c":
            sys.argv = ["-c", *row[2:]]
            exec(compile(row[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(row)
            runpy.run_path(row[0], run_name="__main__")
    finally:
        # multiprocessing's processes leave these out.
        atexit._run_exitfuncs()
