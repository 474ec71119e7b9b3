"""The configs of a pipeline directory's components."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2m.model.components import model_classes, read_config
from runtime.files.checked_json import read_json


def config(directory: Path, name: str) -> dict[str, Any]:
    """A component's config as its class reads it; a scheduler's as it is, without diffusers' own
    fields."""
    if name != "scheduler":
        return read_config(directory / name, dict(model_classes(directory))[name])
    values = read_json(directory / name / "scheduler_config.json", infinite=True)
    return {key: value for key, value in values.items() if not key.startswith("_")}
