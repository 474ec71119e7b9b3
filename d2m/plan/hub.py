"""A pipeline's directory, given as a path or as an id of the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from d2m.plan.model_config import shipped_configs
from runtime.files.checked_json import read_json

UNPACKED = "unpacked.json"  # in a directory of d2m.unpack: what it was made from


def base_model(dense: str | os.PathLike[str], found: Path) -> str:
    """What a model was made from, as the user named it; `found` is its directory."""
    if (found / UNPACKED).is_file():
        return str(read_json(found / UNPACKED).get("base_model"))
    return str(dense)


def locate(dense: str | os.PathLike[str]) -> Path:
    """The directory of a dense pipeline; a hub id (`owner/name`) is fetched with diffusers.

    FileNotFoundError, in one sentence, if it is neither.
    """
    path = Path(dense)
    if path.exists():
        return path
    owner, _, name = str(dense).partition("/")
    # `models/shapes-dens` next to a folder `models` is a mistyped path, nothing to ask the hub for.
    if dense in shipped_configs():
        raise FileNotFoundError(
            f"{dense} is a config that comes with d2m, for d2m plan; expected a model with "
            "weights: give a pipeline directory, or a hub id such as black-forest-labs/FLUX.1-dev."
        )
    if not owner or not name or "/" in name or owner[0] in ".~" or Path(owner).exists():
        raise FileNotFoundError(
            f"{dense} is no directory; expected a diffusers pipeline directory such as "
            "models/shapes-dense, or a hub id such as black-forest-labs/FLUX.1-dev."
        )
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(str(dense)))
    except Exception as error:  # of many kinds, by network, licence and release of the hub
        raise FileNotFoundError(
            f"{dense} is no directory here and could not be fetched from the hub "
            f"({reason_of(error)}); "
            "check the path, or log in and accept the model's licence."
        ) from error


def reason_of(error: BaseException) -> str:
    """Why a library could not fetch something, in one line.

    Libraries of the hub wrap an error in another that names a stack trace "above", which a command
    line does not show: the first that says something of its own is taken.
    """
    last = error
    while True:
        text = " ".join(str(error).strip().split("\n")[0].split())
        if text and "stacktrace" not in text.replace(" ", "").lower():
            return text[:300].rstrip(". ")
        inner = error.__cause__ or error.__context__
        if inner is None:
            return type(last).__name__
        error = inner
