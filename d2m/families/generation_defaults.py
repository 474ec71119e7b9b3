"""How a pipeline directory wants to generate: size, steps, guidance, the longest text.

Its optional `defaults.json`, and where that is silent, what its component configs imply.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2m.families.known import family_of
from runtime.files.atomic import write_json
from runtime.files.checked_json import read_json

DEFAULTS_FILE = "defaults.json"
FIELDS: dict[str, type] = {
    "height": int,
    "width": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "max_sequence_length": int,
}


def generation_defaults(directory: str | Path) -> dict[str, Any]:
    """How to generate with the pipeline in `directory` (reads JSON files only, no torch).

    Returns height and width (pixels), num_inference_steps, guidance_scale, max_sequence_length.
    `defaults.json` in the directory wins; the rest is what the family's `generation_defaults` reads
    from the component configs: for FLUX.1 the VAE's `sample_size`, and for a model with guidance
    embedding ([dev]) 28 steps at 3.5 and T5 texts of up to 512 tokens, without ([schnell]) 4, 0.0
    and 256.

    Raises FileNotFoundError if the directory is no pipeline, ValueError for a bad `defaults.json`.
    """
    directory = Path(directory)
    if not (directory / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{str(directory)!r} has no model_index.json, so it is not a diffusers pipeline "
            "directory; give one that save_pretrained or d2m convert has written"
        )
    values = family_of(directory).plan.generation_defaults(lambda file: _config(directory / file))
    path = directory / DEFAULTS_FILE
    if path.is_file():
        values.update(_checked(_config(path), path))
    return values


def write_defaults(directory: str | Path, **values: Any) -> Path:
    """Write `defaults.json` into a pipeline directory; fields as in `generation_defaults`."""
    path = Path(directory) / DEFAULTS_FILE
    return write_json(path, _checked(values, path))


def _config(path: Path) -> dict[str, Any]:
    return read_json(path, infinite=True) if path.is_file() else {}


def _checked(values: dict[str, Any], path: Path) -> dict[str, Any]:
    for name, value in values.items():
        if name not in FIELDS:
            raise ValueError(f"{str(path)!r} names {name!r}, expected only {', '.join(FIELDS)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or (FIELDS[name] is int and (value != int(value) or value < 1)) or value < 0:
            kind = "a whole number from 1 on" if FIELDS[name] is int else "a number from 0 on"
            raise ValueError(f"{str(path)!r}: {name} is {value!r}, expected {kind}")
    return {name: FIELDS[name](value) for name, value in values.items()}
