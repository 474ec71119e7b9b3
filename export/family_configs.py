"""The configs of a pipeline directory's components."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def config(directory: Path, name: str) -> dict[str, Any]:
    """A component's config.json without diffusers' own fields."""
    file = "scheduler_config.json" if name == "scheduler" else "config.json"
    path = directory / name / file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, expected a component's config; save it again.")
    values = json.loads(path.read_text("utf-8"))
    return {key: value for key, value in values.items() if not key.startswith("_")}
