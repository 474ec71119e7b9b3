"""The configs of a pipeline directory's components."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.files.checked_json import read_json


def config(directory: Path, name: str) -> dict[str, Any]:
    """A component's config.json without diffusers' own fields."""
    file = "scheduler_config.json" if name == "scheduler" else "config.json"
    values = read_json(directory / name / file, infinite=name == "scheduler")
    return {key: value for key, value in values.items() if not key.startswith("_")}
