"""The models of a pipeline directory: their classes, and whether their weights fit them.

Whatever reads a checkpoint asks `check_components` first: torch's libraries fill a tensor that is
missing with random numbers and leave out one that is too much.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.families import family_of
from runtime.files.checked_json import read_json
from runtime.files.tensors import read_header, weight_files

if TYPE_CHECKING:
    from torch import nn

LIBRARIES = ("diffusers", "transformers", "d2m")
FLOATS = ("F64", "F32", "BF16", "F16")


def check_components(directory: Path, transformer: bool = True) -> None:
    """ValueError, in one sentence, unless every model's weights are those of its class and config.

    Names, shapes and kinds of numbers, from the files' headers alone; what the class itself leaves
    alone (buffers that older releases stored) or reads under an older name is right.
    transformer: False passes it over. FileNotFoundError where a model has no safetensors.
    """
    for name, cls in model_classes(directory):
        if transformer or name != "transformer":
            check_weights(directory / name, cls)


def model_classes(directory: Path) -> Iterator[tuple[str, Any]]:
    """(name, class) of the components that have weights, as model_index.json names them."""
    from torch import nn

    from d2m.model.sparse_transformer import sparse_class

    family = family_of(directory)
    for name, value in read_json(directory / "model_index.json").items():
        if not (isinstance(value, list) and len(value) == 2 and value[0] in LIBRARIES):
            continue
        library, cls = value
        if cls in family.names.aliases:
            cls = family.names.dense_class
        if cls == family.names.sparse_class:
            found = sparse_class(family)
        else:
            found = getattr(importlib.import_module(library), str(cls), None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            yield name, found


def read_config(folder: Path, cls: Any) -> dict[str, Any]:
    """A component's config.json as its class reads it.

    Fields that it leaves out have the class's defaults; those that only an older class had are left
    out. ValueError where it is no config of the class.
    """
    raw = read_json(folder / "config.json")
    if hasattr(cls, "config_class"):  # transformers
        with read_by(cls, folder):
            found: dict[str, Any] = cls.config_class.from_dict(raw).to_dict()
            return found
    known = inspect.signature(cls.__init__).parameters
    told = {name: raw.get(name, row.default) for name, row in known.items() if name != "self"}
    return {name: value for name, value in told.items() if value is not inspect.Parameter.empty}


def empty_model(folder: Path, cls: Any) -> nn.Module:
    """The model of a component's config.json on the meta device, in eval mode.

    ValueError where its class does not take the config.
    """
    import torch

    config = read_config(folder, cls)
    with read_by(cls, folder), quiet(), torch.device("meta"):
        if hasattr(cls, "config_class"):
            model = cls(cls.config_class.from_dict(config))
            model.tie_weights()
        else:
            model = cls(**config)
    found: nn.Module = model.eval()
    return found


@contextmanager
def read_by(cls: Any, folder: Path) -> Iterator[None]:
    """Within: whatever a class raises for a config is a ValueError, in one sentence."""
    try:
        yield
    except Exception as error:  # a class checks as it likes
        raise ValueError(
            f"{folder / 'config.json'} does not make a {cls.__name__} ({type(error).__name__}: "
            f"{error}); expected the config that was saved with it: copy the pipeline again."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within: diffusers and transformers do not say themselves what they miss."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


def readable(folder: Path, files: list[Path], dtype: str) -> str:
    """How weights of another dtype can be had, a clause."""
    if dtype.startswith("F8_") and folder.name == "transformer" and len(files) == 1:
        command = shlex.join(["d2m", "convert", str(files[0]), "--base", str(folder.parent)])
        return f"as a single file it is read, in bfloat16: {command} -o NEW"
    return "take the weights in bfloat16 or float16"


def check_weights(folder: Path, cls: Any) -> None:
    """As `check_components`, of one model's directory."""
    files = weight_files(folder)
    if not files:
        raise FileNotFoundError(
            f"{folder} lacks .safetensors files, expected the weights of a {cls.__name__}; save it "
            "with save_pretrained (pickled .bin weights are not read)."
        )
    stored = {name: tensor for path in files for name, tensor in read_header(path).items()}
    tensors = empty_model(folder, cls).state_dict(keep_vars=True)
    for name, tensor in stored.items():
        known = tensors.get(name)
        # Of one with another name than in the class, the ending tells a weight from a buffer.
        weight = name.endswith((".weight", ".bias")) if known is None else known.is_floating_point()
        if tensor.dtype not in FLOATS and weight:
            raise ValueError(
                f"{folder} stores the tensor {name} as {tensor.dtype}, expected one of "
                f"{', '.join(FLOATS)}; {readable(folder, files, tensor.dtype)}."
            )
    # Two names of one tensor (T5's embedding) need one that is stored.
    held = {id(tensors[name]) for name in stored if name in tensors}
    missing = [name for name, tensor in tensors.items() if id(tensor) not in held]
    extra = [name for name in stored if name not in tensors]
    wrong = [
        (name, stored[name].shape, tuple(tensor.shape))
        for name, tensor in tensors.items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    if missing or extra:  # the class knows its own older names; nothing is read
        with quiet():
            _, told = cls.from_pretrained(
                folder,
                local_files_only=True,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        missing, extra = sorted(told["missing_keys"]), sorted(told["unexpected_keys"])
        wrong = sorted((name, tuple(a), tuple(b)) for name, a, b in told["mismatched_keys"])
    if missing or extra:
        name, verb = (missing[0], "lacks") if missing else (extra[0], "holds")
        has = "has" if missing else "does not have"
        raise ValueError(
            f"{folder} {verb} the tensor {name}, which the {cls.__name__} of its config.json {has} "
            f"({len(missing)} missing, {len(extra)} too many); copy weights and config of one "
            "model again."
        )
    if wrong:
        name, found, needed = wrong[0]
        raise ValueError(
            f"{folder}: the tensor {name} is {list(found)}, expected {list(needed)} for the "
            f"{cls.__name__} of its config.json; copy weights and config of one model again."
        )
