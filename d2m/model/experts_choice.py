"""Which realisation of the routed experts runs: decided once per kind of call, and said in the log.

Triton kernels on CUDA from sm_80 up, `F.grouped_mm` on CUDA from sm_90 up without Triton, the
sorted loop everywhere else. `use("sorted")` or the environment variable D2M_EXPERTS=sorted decides
by hand; a realisation that cannot run the call is an error, never another realisation.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

log = logging.getLogger("d2m")

# Name -> where its forward and its backward are; the fastest first.
REALISATIONS = {
    "triton": "d2m.kernels.op:forward_triton,backward_triton",
    "grouped_mm": "d2m.model.grouped_mm:forward_grouped,backward_grouped",
    "sorted": "d2m.model.sorted_loop:forward_sorted,backward_sorted",
}
VARIABLE = "D2M_EXPERTS"
_forced: list[str] = []


@dataclass(frozen=True)
class Case:
    """What a choice depends on. `sm`: 90 for compute capability 9.0, 0 off CUDA; `hidden`: H."""

    device: str
    sm: int
    dtype: torch.dtype
    width: int
    hidden: int
    has_triton: bool
    interpreted: bool
    activation: str = "gelu_tanh"


def case_of(x: Tensor, w2: Tensor, activation: str = "gelu_tanh") -> Case:
    """The case of a call with x [T, D] and w2 [E, H, D]."""
    sm = 0
    if x.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(x.device)
        sm = 10 * major + minor
    return Case(
        x.device.type,
        sm,
        x.dtype,
        x.shape[1],
        w2.shape[1],
        _has_triton(),
        os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
        activation,
    )


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def impossible(name: str, case: Case) -> str | None:
    """Why a realisation cannot run a case at all, or None."""
    if name == "triton":
        if not case.has_triton:
            return "triton is not installed"
        if case.device != "cuda" and not case.interpreted:
            return f"the tensors are on {case.device}"
        if case.device == "cuda" and case.sm < 80:
            return f"the GPU is sm_{case.sm}, older than sm_80"
        if case.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{case.dtype} is not float32, float16 or bfloat16"
    if name == "grouped_mm":
        if not hasattr(torch.nn.functional, "grouped_mm"):
            return f"torch {torch.__version__} has no grouped_mm"
        if case.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{case.dtype} is not float32, float16 or bfloat16"
        if case.width * case.dtype.itemsize % 16 or case.hidden * case.dtype.itemsize % 16:
            return f"rows of {case.width} or {case.hidden} {case.dtype} are not whole 16 bytes"
    return None


def slower(name: str, case: Case) -> str | None:
    """Why a realisation that could run a case is not the one to take, or None."""
    if name == "triton" and case.device != "cuda":
        return "off CUDA it runs in Triton's interpreter, which is for tests"
    if name == "grouped_mm":
        if case.device != "cuda":
            return f"on {case.device} it is itself a loop"
        if case.sm < 90 or case.dtype != torch.bfloat16:
            return f"on sm_{case.sm} in {case.dtype} it waits for the counts, as the loop does"
    return None


@contextmanager
def use(name: str) -> Iterator[None]:
    """Inside the `with`, every call takes the named realisation or raises ValueError."""
    _known(name, "use")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def _known(name: str, source: str) -> None:
    if name not in REALISATIONS:
        raise ValueError(
            f"{source} names the realisation {name!r}; expected one of {', '.join(REALISATIONS)}."
        )


@lru_cache(maxsize=256)
def choose(case: Case, forced: str | None, source: str) -> str:
    """The realisation for a case. Logs the choice and its reasons the first time."""
    kind = f"sm_{case.sm}" if case.device == "cuda" else case.device
    what = f"routed experts on {kind}, {case.dtype}, D={case.width}, H={case.hidden}"
    what += "" if case.activation == "gelu_tanh" else f", {case.activation}"
    if forced:
        _known(forced, source)
        reason = impossible(forced, case)
        if reason:
            raise ValueError(
                f"{source} asks for the realisation {forced!r} but {reason}; unset it or name "
                "another."
            )
        log.info("%s: %s, because %s says so", what, forced, source)
        return forced
    passed: list[str] = []
    for name in REALISATIONS:
        reason = impossible(name, case) or slower(name, case)
        if reason is None:
            why = "; ".join(passed) or "the fastest there is"
            log.info("%s: %s (%s)", what, name, why)
            return name
        passed.append(f"not {name}: {reason}")
    raise AssertionError("the sorted loop runs everywhere")


@lru_cache(maxsize=16)
def functions(name: str) -> tuple[Callable, Callable]:
    """The forward and the backward function of a realisation, imported at first use."""
    module, _, names = REALISATIONS[name].partition(":")
    forward, backward = names.split(",")
    loaded = importlib.import_module(module)
    return getattr(loaded, forward), getattr(loaded, backward)


def realisation(x: Tensor, w2: Tensor, activation: str) -> tuple[Callable, Callable]:
    """Forward and backward for a call with x [T, D] and w2 [E, H, D]."""
    if _forced:
        forced, source = _forced[-1], "use()"
    else:
        forced, source = os.environ.get(VARIABLE, ""), VARIABLE
    return functions(choose(case_of(x, w2, activation), forced, source))
