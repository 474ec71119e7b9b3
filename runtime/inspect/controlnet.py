"""What a ControlNet's bundle holds."""

from __future__ import annotations

from collections import Counter
from typing import Any

from runtime.bundle.control_record import COMPONENT
from runtime.bundle.directory import Bundle
from runtime.files.checked_json import printable


def inspect_controlnet(bundle: Bundle) -> dict[str, Any]:
    """A ControlNet's bundle as a dict of JSON values."""
    manifest = bundle.manifest
    files = {name: row["size"] for name, row in sorted(manifest["files"].items())}
    return {
        "what": "ControlNet bundle",
        "path": str(bundle.path),
        "name": manifest["name"],
        "family": manifest["family"],
        "model": manifest.get("model"),
        "digest": bundle.digest,
        "compute_dtype": manifest["compute_dtype"],
        "storage_dtype": manifest["storage_dtype"],
        "blocks": dict(Counter(call["type"] for call in bundle.component(COMPONENT)["program"])),
        "residuals": manifest["control"]["residuals"],
        "modes": manifest["control"]["modes"],
        "plans": sorted(manifest.get("plans", {})),
        "files": files,
        "bytes": sum(files.values()),
    }


def controlnet_lines(info: dict[str, Any]) -> list[str]:
    """`inspect_controlnet`'s answer for people, one fact a line."""
    named = " + ".join(f"{count} {kind}" for kind, count in info["blocks"].items())
    behind = ", ".join(f"{count} for {stem}" for stem, count in info["residuals"].items())
    out = [f"{info['what']} {info['name']}", f"blocks: {named}", f"residuals: {behind}"]
    if info["modes"]:
        out.append(f"a union of {info['modes']} kinds of control image")
    for field in ("model", "family", "compute_dtype", "storage_dtype", "digest"):
        out.append(f"{field.replace('_', ' ')}: {info[field]}")
    out.append(f"plans: {', '.join(info['plans']) or 'none'}")
    out.append(f"files: {len(info['files'])}, {info['bytes'] / 1e6:.1f} MB")
    out += [f"  {size:>12,}  {name}" for name, size in info["files"].items()]
    return [printable(line) for line in out]
