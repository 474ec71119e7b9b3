"""The families of models that bundles may hold, by the name in their manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.families.chroma import CHROMA
from runtime.families.family import Family
from runtime.families.flux import FLUX
from runtime.families.flux2 import FLUX2
from runtime.families.pixart import PIXART
from runtime.families.qwen import QWEN
from runtime.families.sd3 import SD3
from runtime.families.zimage import ZIMAGE

ROWS = (FLUX, FLUX2, SD3, PIXART, QWEN, ZIMAGE, CHROMA)
FAMILIES: dict[str, Family] = {family.name: family for family in ROWS}


def title_of(config: Mapping[str, Any]) -> str | None:
    """The title of the model that a transformer's config is of; None for a class not known."""
    name = config.get("_class_name")
    found = (family for family in FAMILIES.values() if name in family.classes)
    return next((family.title_of(config) for family in found), None)


def family_of(manifest: Mapping[str, Any]) -> Family:
    """The row of a checked manifest's family."""
    return FAMILIES[manifest["family"]]


def is_guided(manifest: Mapping[str, Any]) -> bool:
    """Whether a bundle generates with classifier-free guidance: its own word, or its family's."""
    return bool(manifest.get("guided", family_of(manifest).guided))
