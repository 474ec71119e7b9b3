"""What each stage needs, compared with this machine; what cannot fit is refused before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2m.plan.machine import disk_free, existing, gpus, memory
from d2m.plan.model_config import subject_of
from d2m.plan.needs import Needs, convert_needs, export_needs, folder_bytes, run_needs
from d2m.units import bytes_text, clock

SURE = 0.75  # memory is refused when short by more than the formulas may be wrong
OFFLOAD = "run --offload block"
PRESETS = ("L", "M", "S", "XS")  # from the most parameters to the fewest
CURES = {
    "convert": "--init-only --importance magnitude converts block by block",
    "export": "export on a machine with more memory",
    "run": "a smaller image, or another machine",
}


def needs(
    model: str | os.PathLike[str],
    machine: Mapping[str, Any],
    *,
    preset: str | None = None,
    recipe: str | os.PathLike[str] | None = None,
    **size: Any,
) -> list[dict[str, Any]]:
    """Rows {stage, ram, vram, disk, seconds, fits, obstacle, cure, formula} for a model.

    convert is estimated for a dense model with a recipe or preset, streamed and trained; export and
    run for what comes of it, or for the model as it is. machine: `d2m.plan.machine.machine()`.
    size: height, width, text_tokens, top_k.
    """
    made: dict[str, Any] = {"preset": preset, "recipe": recipe}
    rows = []
    if subject_of(model).sparse is None and (preset or recipe):
        rows.append(("convert", "convert --init-only", convert_needs(model, **made)))
        rows.append(("convert", "convert", convert_needs(model, streamed=False, **made)))
    rows.append(("export", "export --trt-rtx", export_needs(model, plans=1, **made)))
    rows.append(("run", "run", run_needs(model, **made, **size)))
    offloaded = run_needs(model, **made, **size, offload=True)
    rows.append(("run", OFFLOAD, offloaded))
    answer = [row(stage, title, found, machine) for stage, title, found in rows]
    *_, whole, streamed = answer
    if not whole["fits"]:
        cures = ["run with --offload block"] if streamed["fits"] else []
        smaller = PRESETS[PRESETS.index(preset.upper()) + 1 :] if preset else PRESETS[1:]
        if preset or recipe is None:
            cures += [f"a preset with fewer parameters ({', '.join(smaller)})"] if smaller else []
        whole["cure"] = ", ".join([*cures, "a smaller image, or another machine"])
    return answer


def row(stage: str, title: str, found: Needs, machine: Mapping[str, Any]) -> dict[str, Any]:
    """One stage against the machine; a GPU of the machine is what run would use."""
    gpu = machine["gpus"][0] if machine["gpus"] else None
    short = []
    on_gpu = stage == "run" and gpu is not None and found.vram is not None
    if on_gpu and gpu is not None and found.vram is not None and found.vram > gpu["free"]:
        short.append(f"{bytes_text(found.vram)} of GPU memory, {bytes_text(gpu['free'])} free")
    free = machine["ram_available"]
    if not on_gpu and free is not None and found.ram > free:
        short.append(f"{bytes_text(found.ram)} of memory, {bytes_text(free)} available")
    if stage != "run" and found.disk > machine["disk_free"]:
        short.append(f"{bytes_text(found.disk)} of disk, {bytes_text(machine['disk_free'])} free")
    trains = title == "convert"
    return {
        "stage": title,
        "ram": found.ram,
        "vram": found.vram,
        "disk": found.disk if stage != "run" else 0,
        # Steps, batch size and the GPU's kernels decide these; nothing was measured yet.
        "seconds": None if trains or on_gpu else round(found.seconds(machine), 1),
        "formula": found.formula,
        "fits": not short,
        "obstacle": "; ".join(short) or None,
        "cure": CURES[stage] if short else None,
    }


def needs_table(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """(title, header, rows) for `print_table`."""
    header = ["stage", "memory", "GPU memory", "disk", "time", "fits"]
    cells = [
        [
            each["stage"],
            bytes_text(each["ram"]),
            bytes_text(each["vram"]) if each["vram"] else "",
            bytes_text(each["disk"]) if each["disk"] else "",
            clock(each["seconds"]) if each["seconds"] is not None else "",
            "yes" if each["fits"] else f"no: {each['obstacle']}",
        ]
        for each in rows
    ]
    return (
        "On this machine (memory and disk within 25 %, time within a half on a free machine):",
        header,
        cells,
    )


# ---------------------------------------------------------------- refused


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
    check_room(found, out, "" if streamed else CURES["convert"], done=done, gpu=not streamed)


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
    check_room(found, out, "" if link else "--link shares what is the same with the checkpoint")


def check_room(
    found: Needs, out: str | os.PathLike[str], cure: str, *, done: int = 0, gpu: bool = False
) -> None:
    """OSError if disk or memory are sure not to be enough.

    done: bytes of `found.disk` that are written already. gpu: the work may be on a GPU, whose
    memory is then what counts; so this machine's is not judged where it has one.
    """
    more = f", or: {cure}" if cure else ""
    free = disk_free(out)
    if found.disk - done > free:
        raise OSError(
            f"{found.stage} writes {bytes_text(found.disk - done)} to {out}, where "
            f"{bytes_text(free)} are free: delete files there, or choose an output on another "
            f"disk{more}."
        )
    ram = memory()
    if ram is None or SURE * found.ram <= ram[1] or (gpu and gpus()):
        return
    raise OSError(
        f"{found.stage} needs about {bytes_text(found.ram)} of memory ({found.formula}), but only "
        f"{bytes_text(ram[1])} are available: end other programs, or use a larger machine{more}."
    )
