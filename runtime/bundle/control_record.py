"""A ControlNet's bundle: one component, and what its manifest says of it, checked.

Its kind is "controlnet", and `control` stands in the place of what an image needs:

    residuals  list of blocks in the transformer -> how many residuals there are for it
    modes      kinds of control image that a union knows, 0 for a ControlNet of one kind
    shifted    whether the latents of control images lose the VAE's shift
    pooled     "prompt" or "zeros": which pooled text it reads
    channels   of the latents of control images
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.families import FAMILIES
from runtime.files.checked_json import integer, mapping, one_of, wrong

KIND = "controlnet"
COMPONENT = "controlnet"
ADD = "add"  # the block type: hidden_states, residual -> hidden_states
MAX_RESIDUALS = 1000
POOLED = ("prompt", "zeros")


def residual_name(stem: str, index: int) -> str:
    """The component's output for the blocks of a list."""
    return f"{stem}.{index}"


def check_control(manifest: Mapping[str, Any]) -> None:
    """ValueError (a clause) unless `control` and the component, itself checked, fit."""
    if FAMILIES[manifest["family"]].residuals is None:
        known = [name for name, row in FAMILIES.items() if row.residuals is not None]
        raise wrong("family", manifest["family"], f"one of {', '.join(known)} in a ControlNet")
    control = mapping(dict(manifest), "control")
    counts = mapping(control, "residuals", "control")
    for stem in counts:
        integer(counts, stem, 0, MAX_RESIDUALS, "control.residuals")
    integer(control, "modes", 0, 1000, "control")
    integer(control, "channels", 1, 4096, "control")
    one_of(control, "pooled", POOLED, "control")
    if type(control.get("shifted")) is not bool:
        raise wrong("control.shifted", control.get("shifted"), "true or false")
    row, where = manifest["components"][COMPONENT], f"components.{COMPONENT}"
    named = {residual_name(stem, i) for stem in counts for i in range(counts[stem])}
    if not named or set(row["outputs"]) != named:
        raise wrong(f"{where}.outputs", sorted(row["outputs"]), "those that control names")
    needed = {"hidden_states", "control", "scale"} | ({"mode"} if control["modes"] else set())
    if missing := sorted(needed - set(row["inputs"])):
        raise wrong(f"{where}.inputs", sorted(row["inputs"]), f"{missing[0]} among them")
    kind = mapping(row["types"], ADD, f"{where}.types")
    read, written = ["hidden_states", "residual"], ["hidden_states"]
    if kind["inputs"] != read or kind["outputs"] != written or kind["weights"]:
        raise wrong(f"{where}.types.{ADD}", kind["inputs"], "the addition of a residual")
    if set(kind["graphs"]) != {""}:
        raise wrong(f"{where}.types.{ADD}.graphs", list(kind["graphs"]), "one graph")
