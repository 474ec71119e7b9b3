"""A bundle's record of where every Linear of the dense model lies in it, for LoRAs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.bundle.reading import broken
from runtime.files.checked_json import parse_json
from runtime.files.tensors import SafeTensors
from runtime.lora.placement import Placement

if TYPE_CHECKING:
    from runtime.bundle.directory import Bundle

MAX_MAP = 64 << 20  # bytes


def placement_of(bundle: Bundle) -> Placement:
    """The bundle's placement, checked against its weights; ValueError, one sentence."""
    record = bundle.manifest.get("lora")
    if quant := bundle.manifest.get("quant"):
        raise ValueError(
            f"bundle {bundle.path} has {quant['format']} weights, to which a LoRA cannot be added;"
            " fuse it with d2m lora and export the result with --quant, or export without --quant."
        )
    if record is None:
        raise ValueError(
            f"bundle {bundle.path} does not say where a LoRA's changes go, since it was exported"
            " before bundles did; export it again."
        )
    indices = bundle.file(record["indices"])
    stamps = {indices: bundle.stamps[record["indices"]]} if bundle.stamps else None
    try:
        found = parse_json(bundle.read(record["map"], MAX_MAP))
        return Placement(found, SafeTensors(indices, stamps=stamps), bundle.weights("transformer"))
    except (ValueError, TypeError) as error:
        raise broken(
            bundle.path, f"its {record['map']} is not what was exported: {error}"
        ) from None
