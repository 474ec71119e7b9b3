"""Two child processes for the kernels: one interprets, one compiles (see kernelcases.py)."""

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tests.cases import kernels as kernelcases


def _child(initializer: Callable[[], None]) -> Iterator[Callable[..., Any]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (Linux x86-64: pip install -e '.[dev]')")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer) as pool:
        yield lambda function, *args, **kw: pool.submit(function, *args, **kw).result()


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """interpreted(function, ...): its result, from a process where kernels are interpreted."""
    yield from _child(kernelcases.start_interpreter)


@pytest.fixture(scope="session")
def compiled() -> Iterator[Callable[..., Any]]:
    """compiled(function, ...): its result, from a process where kernels are compiled."""
    yield from _child(kernelcases.start_compiler)
