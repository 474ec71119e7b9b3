"""Traced graphs kept from test to test: many tiny models have the same encoders and blocks.

Tracing is most of an export's time. A graph is kept under a hash of everything that it can depend
on: the module's classes, attributes and buffers down to the last, its parameters' shapes and
dtypes (a trace never reads their values), the call, the inputs and outputs, the versions of the
libraries and the sources of d2m and export. What cannot be described so is traced as ever.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.metadata
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum)


@functools.cache
def sources(*folders: str) -> bytes:
    """A hash of the Python sources under some folders of the repository, and of the libraries."""
    total = hashlib.sha256(repr(sys.version_info).encode())
    for name in LIBRARIES:
        total.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            total.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return total.digest()


class Undescribed(Exception):
    """An object of a kind whose state cannot be read."""


def describe(value: Any, feed: Callable[[bytes], None], seen: dict[int, Any]) -> None:
    """Feed a value's whole state, in the order in which it is reached; objects once each."""
    import numpy as np
    import torch

    def say(*words: object) -> None:
        feed(repr(words).encode())

    if isinstance(value, (*PLAIN, torch.dtype, torch.device, torch.Size)):
        return say(type(value).__qualname__, value)
    if id(value) in seen:
        return say("seen", list(seen).index(id(value)))
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        say("tensor", type(value).__qualname__, tuple(value.shape), str(value.dtype))
        if not isinstance(value, torch.nn.Parameter) and value.device.type == "cpu":
            feed(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            say(getattr(value, "float32_for", ()))
        return None
    if isinstance(value, np.ndarray | np.generic):
        say("array", value.shape, str(value.dtype))
        return feed(value.tobytes())
    if isinstance(value, Mapping):
        say(type(value).__qualname__, len(value))
        # The directory that a model was loaded from is no part of it.
        items = [item for item in value.items() if item[0] not in ("_name_or_path", "name_or_path")]
        parts: list[Any] = [part for item in items for part in item]
    elif isinstance(value, list | tuple):
        say(type(value).__qualname__, len(value))
        parts = list(value)
    elif isinstance(value, set | frozenset):
        say("set", sorted(map(repr, value)))
        parts = []
    elif isinstance(value, types.MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, types.FunctionType):
        say("function", value.__module__, value.__qualname__)
        feed(value.__code__.co_code)
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = [value.__defaults__, value.__kwdefaults__, cells, of_tests(value)]
    elif isinstance(value, type):
        say("class", value.__module__, value.__qualname__)
        parts = [of_tests(value)]
    elif isinstance(value, types.ModuleType | types.BuiltinFunctionType):
        say("library", value.__name__)
        parts = []
    elif hasattr(value, "__dict__"):
        parts = [type(value), vars(value)]
    else:
        raise Undescribed(type(value))
    for part in parts:
        describe(part, feed, seen)


def of_tests(value: Any) -> str:
    """The source of a class or function that a test defines; "" of one of d2m or a library."""
    return inspect.getsource(value) if value.__module__.startswith("tests") else ""


def kept(folder: Path) -> Callable[..., Any]:
    """export.graph.trace.trace with its graphs kept in `folder`, which processes may share."""

    def traced(*arguments: Any) -> Any:
        import onnx

        from export.graph.trace import trace
        from runtime.files.atomic import write_bytes

        total = hashlib.sha256(sources("d2m", "export"))
        try:
            describe(arguments, total.update, {})
        except Undescribed:
            return trace(*arguments)
        path = folder / f"{total.hexdigest()[:32]}.onnx"
        if path.is_file():
            return onnx.load_from_string(path.read_bytes())
        graph = trace(*arguments)
        write_bytes(path, graph.SerializeToString(deterministic=True), lasting=False)
        return graph

    return traced
