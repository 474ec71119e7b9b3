"""What `d2m run` reads and writes beside the bundle: files of prompts, names of images."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from runtime.files.checked_json import parse_json, show

KEYS = ("prompt", "seed", "negative")  # of a line of JSON
MAX_SLUG = 60  # characters of a prompt in a file's name


def read_prompts(path: Path, seed: int, negative: str | None) -> dict[str, Any]:
    """The prompts of a file ("-": standard input) as a pipeline's arguments.

    A line is a prompt, or a JSON object of prompt, seed and negative; empty lines are left out.
    `seed` and `negative` are those of lines that name none. Raises ValueError with one sentence.
    """
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    name = "standard input" if str(path) == "-" else str(path)
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}); save it as UTF-8") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not (text := line.strip()):
            continue
        row: Any = {"prompt": text}
        if text.startswith("{"):
            try:
                row = parse_json(text.encode())
            except ValueError as error:
                raise ValueError(f"line {number} of {name} is not valid JSON ({error})") from None
        other = [key for key in row if key not in KEYS] or None
        if other or "prompt" not in row:
            has = f"the key {show(other[0])}" if other else "no prompt"
            raise ValueError(
                f"line {number} of {name} has {has}, expected keys of {', '.join(KEYS)}"
            )
        rows.append({"seed": seed, "negative": negative} | row)
    if not rows:
        raise ValueError(f"{name} holds no prompts, expected one in a line")
    negatives = [row["negative"] for row in rows]
    return {
        "prompt": [row["prompt"] for row in rows],
        "seed": [row["seed"] for row in rows],
        "negative": [text or "" for text in negatives] if any(negatives) else None,
    }


def image_files(out: Path, prompts: list[str], seeds: list[int], many: bool) -> list[Path]:
    """A file per image; {index}, {seed} and {prompt} in `out` are filled in.

    Without any of them images of a call of many are named out-0.png, out-1.png and so on.
    """
    stem = out.stem
    if many and not any(f"{{{key}}}" in stem for key in ("index", "seed", "prompt")):
        stem += "-{index}"
    files = []
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        values = {"index": str(index), "seed": str(seed), "prompt": slug(prompt)}
        parts = re.split(r"\{(index|seed|prompt)\}", stem)  # every second one is a name
        name = "".join(values[part] if i % 2 else part for i, part in enumerate(parts))
        files.append(out.with_name(name + out.suffix))
    twice = [file for index, file in enumerate(files) if file in files[:index]]
    if twice:
        raise ValueError(f"two images would be named {twice[0]}; put {{index}} into the name")
    return files


def slug(prompt: str) -> str:
    """A prompt as a part of a file's name: letters and digits of any language, and dashes."""
    return re.sub(r"[\W_]+", "-", prompt).strip("-")[:MAX_SLUG].strip("-") or "prompt"
