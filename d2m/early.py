"""convert and export refuse before they start what is sure not to fit, and say what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from d2m.machine import disk_free, existing, memory
from d2m.resources import Needs, convert_needs, export_needs, folder_bytes
from d2m.units import shown

SURE = 0.75  # memory is refused when short by more than the formulas may be wrong
STREAM = "--init-only --importance magnitude converts block by block"


def check_convert(
    dense: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    preset: str | None,
    recipe: str | os.PathLike[str] | None,
    streamed: bool,
    resume: bool = False,
) -> None:
    """OSError, in one sentence with the cure, where disk or memory are not enough to convert.

    What else is wrong with the arguments is left to the conversion to say.
    """
    if not (Path(dense) / "model_index.json").is_file():
        return  # a hub id, or a mistake
    chosen: dict[str, Any] = {"recipe": recipe} if recipe else {"preset": preset}
    try:
        found = convert_needs(dense, streamed=streamed, **chosen)
    except (ValueError, FileNotFoundError):
        return
    work = Path(out).with_name(Path(out).name + ".work")
    done = folder_bytes(work) if resume and work.is_dir() else 0
    refuse_early(found, out, "" if streamed else STREAM, done=done, gpu=not streamed)


def check_export(
    sparse: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    top_k: int,
    plans: int,
    link: bool,
    storage: str | None = None,
) -> None:
    """The same for an export; links save disk where both are on one file system."""
    if not (Path(sparse) / "model_index.json").is_file():
        return
    together = link and os.stat(sparse).st_dev == os.stat(existing(Path(out))).st_dev
    size = {None: None, "fp32": 4}.get(storage, 2)
    try:
        found = export_needs(sparse, top_k=top_k, plans=plans, link=together, storage=size)
    except (ValueError, FileNotFoundError):
        return
    refuse_early(found, out, "" if link else "--link shares what is the same with the checkpoint")


def refuse_early(
    needs: Needs, out: str | os.PathLike[str], cure: str, *, done: int = 0, gpu: bool = False
) -> None:
    """OSError if disk or memory are sure not to be enough.

    done: bytes of `needs.disk` that are written already. gpu: the work may be on a GPU, whose
    memory is then what counts; so this machine's is not judged where it has one.
    """
    more = f", or: {cure}" if cure else ""
    free = disk_free(out)
    if needs.disk - done > free:
        raise OSError(
            f"{needs.stage} writes {shown(needs.disk - done)} to {out}, expected as much room there"
            f" and found {shown(free)}: free some, or choose an output on another disk{more}."
        )
    ram = memory()
    if ram is None or SURE * needs.ram <= ram[1]:
        return
    if gpu:
        from d2m.machine import gpus

        if gpus():
            return
    raise OSError(
        f"{needs.stage} needs about {shown(needs.ram)} of memory ({needs.formula}), expected that"
        f" and found {shown(ram[1])} available: end other programs, or use a larger machine{more}."
    )
