"""Convert, export and run on this machine, foretold: what each needs, whether it fits, the cure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from d2m.resources import Needs, convert_needs, export_needs, run_needs, shown
from d2m.subject import subject_of
from d2m.units import clock

CURES = {
    "convert": "--init-only --importance magnitude converts block by block",
    "export": "export on a machine with more memory",
    "run": "a preset with fewer parameters (S, XS), a smaller picture, or another machine",
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

    convert is foretold for a dense model with a recipe or preset, streamed and trained; export and
    run for what comes of it, or for the model as it is. machine: `d2m.machine.machine()`. size:
    height, width, text_tokens, top_k.
    """
    made: dict[str, Any] = {"preset": preset, "recipe": recipe}
    rows = []
    if subject_of(model).sparse is None and (preset or recipe):
        rows.append(("convert", "convert --init-only", convert_needs(model, **made)))
        rows.append(("convert", "convert", convert_needs(model, streamed=False, **made)))
    rows.append(("export", "export --trt-rtx", export_needs(model, plans=1, **made)))
    rows.append(("run", "run", run_needs(model, **made, **size)))
    return [row(stage, title, found, machine) for stage, title, found in rows]


def row(stage: str, title: str, found: Needs, machine: Mapping[str, Any]) -> dict[str, Any]:
    """One stage against the machine; a GPU of the machine is what run would use."""
    gpu = machine["gpus"][0] if machine["gpus"] else None
    short = []
    on_gpu = stage == "run" and gpu is not None and found.vram is not None
    if on_gpu and gpu is not None and found.vram is not None and found.vram > gpu["free"]:
        short.append(f"{shown(found.vram)} of GPU memory, {shown(gpu['free'])} free")
    free = machine["ram_available"]
    if not on_gpu and free is not None and found.ram > free:
        short.append(f"{shown(found.ram)} of memory, {shown(free)} available")
    if stage != "run" and found.disk > machine["disk_free"]:
        short.append(f"{shown(found.disk)} of disk, {shown(machine['disk_free'])} free")
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
            shown(each["ram"]),
            shown(each["vram"]) if each["vram"] else "",
            shown(each["disk"]) if each["disk"] else "",
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
