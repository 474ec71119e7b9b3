"""JSON that comes from outside: read in one place, its fields taken with their type and range."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

MAX_BYTES = 64 << 20  # of a file
MAX_VALUES = 2_000_000  # brackets and commas of a JSON text: some 100 bytes of memory each


def read_json(
    path: str | os.PathLike[str], what: str = "", most: int = MAX_BYTES, infinite: bool = False
) -> dict[str, Any]:
    """The JSON object in a file; `what` stands before the path in errors: "recipe".

    infinite: take the words Infinity and NaN, which diffusers writes into schedulers' configs.

    FileNotFoundError where there is no file; ValueError, one sentence, for one of more than `most`
    bytes, text that is not UTF-8 or not JSON, and any other value than an object.
    """
    name = f"{what} {printable(str(path))}".strip()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name} is missing, expected a JSON file; copy it there again.")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{name} has more than {most} bytes, which no such file has; restore it.")
    try:
        value = parse_json(data, infinite)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON ({error}); restore the file.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds {show(value)}, expected a JSON object; restore the file.")
    return value


def parse_json(data: bytes, infinite: bool = False) -> Any:
    """A JSON text of unknown origin; ValueError, a clause, where it is none.

    A key must not appear twice, numbers are finite (words apart, where `infinite`), and the values
    cannot take far more memory than their text: "[[],[],..." would take 25 times as much.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES} values")
    try:
        constant = float if infinite else refuse
        hooks: Any = {"parse_constant": constant, "parse_float": finite}
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, **hooks)
    except (ValueError, RecursionError) as error:
        raise ValueError(printable(str(error))[:80]) from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's object hook: refuse an object that names a key twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def finite(text: str) -> float:
    """json's hook for numbers: 1e400 would be infinity."""
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def refuse(constant: str) -> Any:
    """json's hook for NaN and infinities, which JSON does not know."""
    raise ValueError(f"{constant} is no JSON number")


def printable(text: str) -> str:
    """The text with what a terminal might obey, or cannot show, as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def mapping(obj: dict[str, Any], key: str, where: str = "") -> dict[str, Any]:
    """obj[key], which must be an object."""
    value = obj.get(key)
    if not isinstance(value, dict):
        raise wrong(join(where, key), value, "an object")
    return value


def array(
    obj: dict[str, Any], key: str, low: int, high: int, what: str, where: str = ""
) -> list[Any]:
    """obj[key], which must be a list of low to high values; `what` names them in the error."""
    value = obj.get(key)
    if not isinstance(value, list) or not low <= len(value) <= high:
        size = f"{low} to {high}" if low else f"at most {high}"
        size = str(low) if low == high else size
        raise wrong(join(where, key), value, f"a list of {size} {what}")
    return value


def text(obj: dict[str, Any], key: str, where: str = "") -> str:
    """obj[key], which must be a string of reasonable length."""
    value = obj.get(key)
    if not isinstance(value, str) or len(value) > 1000 or not value.isprintable():
        raise wrong(join(where, key), value, "a string of at most 1000 printable characters")
    return value


def integer(obj: dict[str, Any], key: str, low: int, high: int, where: str = "") -> int:
    """obj[key], which must be a whole number from low to high."""
    value = obj.get(key)
    if type(value) is not int or not low <= value <= high:
        raise wrong(join(where, key), value, f"a whole number from {low} to {high}")
    return value


def number(obj: dict[str, Any], key: str, low: float, high: float, where: str = "") -> float:
    """obj[key], which must be a finite number from low to high."""
    value: Any = obj.get(key)
    if type(value) not in (int, float) or not low <= value <= high:
        raise wrong(join(where, key), value, f"a number from {low:g} to {high:g}")
    return float(value)


def one_of(obj: dict[str, Any], key: str, choices: tuple[Any, ...], where: str = "") -> Any:
    """obj[key], which must be one of `choices`."""
    value = obj.get(key)
    if not isinstance(value, str | int) or value not in choices:
        known = ", ".join(map(str, choices)) if choices else "something known"
        raise wrong(join(where, key), value, known if len(choices) < 2 else f"one of {known}")
    return value


def listed(obj: dict[str, Any], key: str, files: dict[str, Any], where: str) -> str:
    """obj[key], which must be a path listed (with size and hash) under files."""
    value = obj.get(key)
    if not isinstance(value, str) or value not in files:
        raise wrong(join(where, key), value, "a path listed under files")
    return value


def join(where: str, key: str) -> str:
    """The dotted name of a field."""
    return f"{where}.{key}" if where else key


def wrong(where: str, value: Any, expected: str) -> ValueError:
    """The clause that names a field, what it holds and what was expected."""
    return ValueError(
        f"{printable(where)[:120]} in its manifest.json is {show(value)}, expected {expected}"
    )


def show(value: Any) -> str:
    """A value of unknown size as at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or numpy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number, of Python or numpy."""
    return is_whole(value) or isinstance(value, float | np.floating)
