"""`d2m doctor`: what is installed and works, what this machine can do with FLUX.1, and advice."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Mapping
from typing import Any

from d2m import __version__
from d2m.plan.fits_here import needs
from d2m.plan.machine import machine
from d2m.units import bytes_text
from runtime.files.extras import EXTRAS, command

BASE = ("numpy", "onnxruntime", "tokenizers", "safetensors", "PIL", "typer", "rich")
MORE = {"triton": "dev"}
PACKAGES = {"PIL": "pillow", "cuda": "cuda-bindings", "onnx_ir": "onnx-ir"}
MODEL, PRESET = "flux-dev", "L"


def doctor(path: str, backends: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Look at this machine; files would be written to `path`.

    backends: name -> (module, the extra that installs it, "" for none). Returns JSON values:
    python, d2m, machine, packages (module -> version, extra, works, reason), extras (name ->
    works), backends (name -> works, reason), stages (FLUX.1 [dev] with preset L, see
    d2m.plan.fits_here) and advice (sentences).
    """
    found = machine(path)
    names = {**dict.fromkeys(BASE, "base"), **EXTRAS, **MORE}
    packages = {name: {"extra": extra, **state(name)} for name, extra in names.items()}
    extras: dict[str, bool] = {}
    for row in packages.values():
        extras[row["extra"]] = extras.get(row["extra"], True) and row["works"]
    answer = {
        "d2m": __version__,
        "python": platform.python_version(),
        "machine": found,
        "packages": packages,
        "extras": extras,
        "backends": {
            name: backend(name, packages.get(module) or state(module), extra, found)
            for name, (module, extra) in backends.items()
        },
        "stages": needs(MODEL, found, preset=PRESET),
    }
    return answer | {"advice": advice(answer)}


def state(module: str) -> dict[str, Any]:
    """{"version", "works", "reason"} of a module: imported, since only that shows that it works."""
    if importlib.util.find_spec(module) is None:
        return {"version": None, "works": False, "reason": "not installed"}
    version = installed_version(PACKAGES.get(module, module))
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken library raises what it likes; that is the finding
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return {"version": version, "works": False, "reason": text[:200]}
    return {"version": version, "works": True, "reason": None}


def backend(
    name: str, module: Mapping[str, Any], extra: str, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Whether a backend can run here, and why not."""
    if not module["works"]:
        return {"works": False, "reason": f"{module['reason']}; install with: {command(extra)}"}
    if name != "ort" and not found["gpus"]:
        builds = "builds plans, runs none: " if name == "trt-rtx" else ""
        return {"works": False, "reason": f"{builds}no GPU with a driver is visible"}
    return {"works": True, "reason": None}


def advice(answer: Mapping[str, Any]) -> list[str]:
    """What to do, the most important first; each a sentence with what was seen and the cure."""
    found, packages = answer["machine"], answer["packages"]
    sentences = []
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sentences.append(
            f"Python is {answer['python']}, expected 3.11 to 3.13: make another .venv."
        )
    for module, row in packages.items():
        if row["version"] and not row["works"]:
            sentences.append(
                f"{module} {row['version']} is installed and broken ({row['reason']})."
            )
    if all(installed_version(name) for name in ("onnxruntime", "onnxruntime-gpu")):
        sentences.append(
            "onnxruntime and onnxruntime-gpu are both installed and share one module: uninstall"
            " onnxruntime, then install onnxruntime-gpu again with --force-reinstall --no-deps."
        )
    for extra, what in (("convert", "convert"), ("export", "export"), ("trt-rtx", "build plans")):
        missing = [m for m, row in packages.items() if row["extra"] == extra and not row["version"]]
        if missing:
            sentences.append(f"To {what}: {command(extra)} ({', '.join(missing)} missing).")
    torch = packages["torch"]
    if found["gpus"] and "+cpu" in (torch["version"] or ""):
        sentences.append(
            f"torch {torch['version']} cannot use the GPU: install a CUDA build to train."
        )
    if not found["gpus"]:
        sentences.append(
            "No GPU is visible: d2m run generates on the CPU with ONNX Runtime; plans can be built"
            " here (--trt-rtx) and run elsewhere."
        )
    for gpu in found["gpus"]:
        if gpu["sm"] == 90:
            sentences.append(
                f"{gpu['name']} (SM90) is in no TensorRT-RTX support matrix: use --trt."
            )
    if found["share"] < 0.6:
        sentences.append(
            f"One thread gets {found['share']:.0%} of a core: other programs use the processor, so"
            f" that everything takes about {1 / max(found['share'], 0.01):.0f} times as long."
        )
    for row in answer["stages"]:
        if not row["fits"]:
            sentences.append(
                f"{MODEL} with preset {PRESET}, {row['stage']} does not fit: {row['obstacle']}; "
                f"{row['cure']}."
            )
    return sentences


def installed_version(package: str) -> str | None:
    """Of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def lines(answer: Mapping[str, Any]) -> list[str]:
    """The answer for a person, but for the table of stages."""
    found = answer["machine"]
    ram, speed = "?", ", read-only"
    if found["ram"]:
        ram = f"{bytes_text(found['ram_available'])} of {bytes_text(found['ram'])} free"
    if found["disk_speed"]:
        speed = f", written at {bytes_text(found['disk_speed'])}/s"
    text = [
        f"d2m {answer['d2m']}, Python {answer['python']}",
        f"memory {ram}; disk {bytes_text(found['disk_free'])} free{speed}; {found['cores']} cores, "
        f"{found['flops'] / 1e9:.0f} GFLOP/s in float32, one thread gets {found['share']:.0%}",
    ]
    for gpu in found["gpus"]:
        text.append(
            f"GPU {gpu['name']}, SM{gpu['sm']}, {bytes_text(gpu['free'])} of "
            f"{bytes_text(gpu['memory'])} free, driver {gpu['driver']}"
        )
    text += [] if found["gpus"] else ["GPU none visible"]
    for extra, works in answer["extras"].items():
        rows = {m: row for m, row in answer["packages"].items() if row["extra"] == extra}
        versions = ", ".join(f"{m} {row['version'] or 'missing'}" for m, row in rows.items())
        text.append(f"{'works  ' if works else 'missing'} {extra}: {versions}")
    for name, row in answer["backends"].items():
        text.append(f"backend {name}: {'works' if row['works'] else row['reason']}")
    return text
