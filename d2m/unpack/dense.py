"""What `d2m convert` is given -> the pipeline directory it reads: unpacked where that is needed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from d2m.plan.hub import UNPACKED, locate
from d2m.unpack.variants import plain_pipeline

FILES = (".safetensors", ".gguf")


def is_single_file(dense: str) -> bool:
    """Whether it names a checkpoint's file, there or not."""
    return Path(dense).suffix in FILES and not Path(dense).is_dir()


def unpack(
    dense: str,
    base: str | None,
    variant: str | None,
    out: Path,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    log: Callable[[str], None] = print,
) -> str:
    """`dense` where it is a plain pipeline or a hub id, else a directory beside `out`.

    base: for a single file the pipeline, path or hub id, of everything but the transformer. Who
    has finished with `out` calls `remove_unpacked`; until then a resume finds the directory.
    FileNotFoundError, ImportError or ValueError, in one sentence.
    """
    if is_single_file(dense):
        if variant:
            raise ValueError("--variant is for pipelines; leave it out for a single file")
        if base is None:
            raise ValueError(
                f"{dense} is a single file of a transformer; give the pipeline that it belongs to, "
                "for its text encoders, VAE and scheduler: --base PIPELINE (a directory or hub id)"
            )
        from d2m.unpack.single_file import unpack_single_file

        found = locate(base)
        unpack_single_file(
            Path(dense), found, unpacked_folder(out), base, progress=progress, log=log
        )
        return str(unpacked_folder(out))
    if base is not None:
        raise ValueError(f"--base is for a single file, but {dense} is none; leave it out")
    if Path(dense).is_dir():
        return str(plain_pipeline(Path(dense), variant, unpacked_folder(out)))
    if variant:
        raise ValueError("--variant is for a pipeline's directory; download the model first")
    return dense


def unpacked_folder(out: Path) -> Path:
    """The directory of what was unpacked for a result."""
    return out.with_name(out.name + ".dense")


def remove_unpacked(out: Path) -> None:
    """Remove what was unpacked for a result that is finished."""
    if (unpacked_folder(out) / UNPACKED).is_file():
        shutil.rmtree(unpacked_folder(out), ignore_errors=True)
