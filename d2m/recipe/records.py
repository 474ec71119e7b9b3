"""JSON values that a person wrote, checked: unknown keys and wrong types are named, none guessed.

Torch-free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any


def whole(value: Any) -> bool:
    """Whether it is a whole number (true and false are none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


_KINDS = {
    "str": (lambda v: isinstance(v, str), "a string"),
    "int": (whole, "a whole number"),
    "float": (number, "a number"),
    "tuple[str, ...]": (
        lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
        "a list of strings",
    ),
    "tuple[Stage, ...]": (lambda v: isinstance(v, list), "a list of stages"),
    "Mapping[str, float]": (lambda v: isinstance(v, dict), "an object of loss weights"),
    "Calibration": (lambda v: isinstance(v, dict), "an object"),
    "Blocks": (lambda v: isinstance(v, dict), "an object"),
    "AdaLN": (lambda v: isinstance(v, dict), "an object"),
    "Shares": (lambda v: isinstance(v, dict), "an object"),
    "Local | None": (lambda v: v is None or isinstance(v, dict), "an object or null"),
    "bool": (lambda v: isinstance(v, bool), "true or false"),
    "int | None": (lambda v: v is None or whole(v), "a whole number or null"),
}


def record(cls: type, obj: Any, place: str) -> dict[str, Any]:
    """The fields of `obj` for `cls`: an object with known keys, none missing, each of its type."""
    if not isinstance(obj, dict):
        raise ValueError(f"{place} is {obj!r:.60}; expected a JSON object.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    check_keys(obj, place, fields)
    for key, value in obj.items():
        fits, words = _KINDS[str(fields[key].type)]
        check(fits(value), f"{place}: {key}", value, words)
    for name, f in fields.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and name not in obj:
            raise ValueError(f"{place} has no {name!r}; add it.")
    return dict(obj)


def check_keys(obj: Iterable[str], place: str, known: Iterable[str]) -> None:
    """ValueError that names a key of `obj` that is none of the known ones."""
    for key in obj:
        if key not in known:
            raise ValueError(f"{place} has the unknown key {key!r}; known are {', '.join(known)}.")


def check(fine: bool, what: str, value: Any, expected: str) -> None:
    """ValueError in one sentence, `WHAT is VALUE; expected EXPECTED.`, unless `fine`."""
    if not fine:
        raise ValueError(f"{what} is {value!r:.60}; expected {expected}.")
