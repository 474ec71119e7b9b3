"""The families that export knows, by the name of their row in d2m/families/known.py."""

from __future__ import annotations

from typing import Any

from d2m.families import family_of_model
from export.families.chroma import CHROMA
from export.families.family import Family
from export.families.flux import FLUX
from export.families.flux2 import FLUX2
from export.families.pixart import PIXART
from export.families.qwen import QWEN
from export.families.sd3 import SD3
from export.families.zimage import ZIMAGE

ROWS = (FLUX, FLUX2, SD3, PIXART, QWEN, ZIMAGE, CHROMA)
FAMILIES: dict[str, Family] = {family.name: family for family in ROWS}


def export_family(model: Any) -> Family:
    """The row of a transformer in memory, dense or sparse."""
    return FAMILIES[family_of_model(model).names.name]
