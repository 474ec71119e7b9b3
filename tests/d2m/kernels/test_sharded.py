"""FSDP2: weights sharded over two processes, gathered for the op, their gradients scattered."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)
@pytest.mark.slow
def test_sharded_weights():
    names = {"sorted", "grouped_mm"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    if importlib.util.find_spec("triton"):
        environment["TRITON_INTERPRET"] = "1"
        names.add("triton")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(TESTS / "cases/sharded.py"), port]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = dict(line.split() for line in done.stdout.splitlines())
    assert set(errors) == names
    assert all(float(error) < 1e-5 for error in errors.values()), errors
