"""The compiler behind `--trt` and `--trt-rtx`: which module, for which GPUs, and one build.

Both modules have the same Python interface. TensorRT-RTX (`tensorrt_rtx`, on PyPI) builds ahead
of time for GPUs that are not there; TensorRT (`tensorrt`, NVIDIA's own index) builds on the GPU.
A plan is built in a process of its own (export/plans/compiler_process.py), for two reasons: a
builder that aborts does not take the export with it, and the bytes come out the same every time.
Built one after
another in one process they do not: with several dynamic dimensions TensorRT-RTX 1.7.1 orders some
tables by address (11 to 47 bytes differed in 2.6 MB); in a fresh process without address space
randomisation they were identical in every run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.files.checked_json import read_json
from runtime.files.extras import need

log = logging.getLogger("export")

APIS = ("tensorrt", "tensorrt_rtx")
EXTRA_OF = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}
RTX_SM = (75, 80, 86, 89, 120, 121)  # TensorRT-RTX 1.7; Hopper (90) is in no support matrix
ERRORS = {"ValueError": ValueError, "OSError": OSError}


def load_api(api: str = "auto") -> Any:
    """The TensorRT module to build with; ImportError names the extra that is missing."""
    if api != "auto" and api not in APIS:
        raise ValueError(f"the plan api is {api!r}, expected auto, tensorrt or tensorrt_rtx.")
    for name in APIS if api == "auto" else (api,):
        if importlib.util.find_spec(name) is None:
            continue
        trt = importlib.import_module(name)
        reason = (
            "chosen by option" if api != "auto" else "the first of tensorrt, tensorrt_rtx found"
        )
        log.info("plans: %s %s (%s)", name, trt.__version__, reason)
        return trt
    if api == "auto":
        said = "building plans needs tensorrt, or tensorrt_rtx, which needs no GPU to build"
        raise ImportError(need("trt-rtx", said))
    raise ImportError(need(EXTRA_OF[api], f"building plans needs {api}"))


def check_sm(trt: Any, sm: Sequence[int]) -> tuple[int, ...]:
    """Compute capabilities in ascending order; ValueError or OSError where they cannot be built."""
    wanted = tuple(sorted(set(sm)))
    if trt.__name__ == "tensorrt_rtx":
        known = [number for number in RTX_SM if hasattr(trt.ComputeCapability, f"SM{number}")]
        unknown = [str(number) for number in wanted if number not in known]
        if unknown:
            raise ValueError(
                f"--sm is {','.join(unknown)}, expected some of {', '.join(map(str, known))}, which"
                f" TensorRT-RTX {trt.__version__} builds for; leave --sm out for a portable plan."
            )
        return wanted
    here = local_sm()
    if here is None:
        raise OSError(
            f"TensorRT {trt.__version__} builds plans on the GPU they run on and this machine has"
            " none; build with --trt-rtx, which needs no GPU, or export on the GPU machine."
        )
    if wanted not in ((), (here,)):
        raise ValueError(
            f"--sm is {','.join(map(str, wanted))}, expected {here}, this machine's GPU, the only"
            " one TensorRT builds for; leave --sm out, or use --trt-rtx."
        )
    return (here,)


def local_sm() -> int | None:
    """Compute capability of the first GPU as 89 or 90; None without a driver or device."""
    try:
        from cuda.bindings import runtime as cuda
    except ImportError:
        raise ImportError(need("trt", "asking for the GPU needs cuda-bindings")) from None
    attributes = cuda.cudaDeviceAttr
    numbers = []
    for attribute in (
        attributes.cudaDevAttrComputeCapabilityMajor,
        attributes.cudaDevAttrComputeCapabilityMinor,
    ):
        error, value = cuda.cudaDeviceGetAttribute(attribute, 0)
        if int(error):
            return None
        numbers.append(value)
    return 10 * numbers[0] + numbers[1]


def target_name(api: str, capabilities: Sequence[int], quant: str | None = None) -> str:
    """The directory of a set of plans: trt-rtx-portable, trt-rtx-sm86-sm89, trt-rtx-sm120-fp8."""
    cards = [f"sm{number}" for number in capabilities] or ["portable"]
    return "-".join([EXTRA_OF[api], *cards, *([quant] if quant else [])])


def split_by_format(
    trt: Any, sm: Sequence[int], oldest: int, quant: str
) -> list[tuple[tuple[int, ...], str | None]]:
    """Sets of plans for the GPUs `sm`: (capabilities, `quant` or None for 16 bits).

    From the compute capability `oldest` on tensor cores multiply the format (0: none does).
    Without any `sm` portable plans in 16 bits, and those of the format for all that multiply it.
    """
    wanted = check_sm(trt, sm)
    if not oldest:
        return [(wanted, None)]
    known = wanted or tuple(n for n in RTX_SM if hasattr(trt.ComputeCapability, f"SM{n}"))
    newer = tuple(number for number in known if number >= oldest)
    older = tuple(number for number in wanted if number < oldest)
    plain: list[tuple[tuple[int, ...], str | None]] = [(older, None)] if older or not wanted else []
    return [*plain, *([(newer, quant)] if newer else [])]


def build(
    trt: Any,
    model: Any,
    shapes: Mapping[str, Sequence[Sequence[int]]],
    *,
    sm: Sequence[int] = (),
    name: str = "the graph",
    kernels: Mapping[str, Any] | None = None,
) -> tuple[bytes, str]:
    """Compile one ONNX model in a process of its own; returns the plan and its layer dump.

    `shapes`: input -> (min, opt, max) shapes, for inputs that have dynamic dimensions. Types are
    the graph's own (strongly typed), float32 stays float32 (no TF32). `kernels` {"folder", "plan"}
    registers plugins first (export/plans/plugins.py; TensorRT proper alone). The same model, shapes
    and release give the same bytes. ValueError names the plan and, where there is one, the node.
    """
    with tempfile.TemporaryDirectory(prefix="d2m-plan-") as folder:
        job = {"api": trt.__name__, "name": name, "sm": list(sm), "shapes": dict(shapes)}
        if kernels is not None:
            root = str(Path(__file__).resolve().parents[2])
            job["kernels"] = {
                "root": root,
                "folder": str(kernels["folder"]),
                "plan": kernels["plan"],
            }
        Path(folder, "job.json").write_text(json.dumps(job, sort_keys=True))
        Path(folder, "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
        # -P: the script's own directory stays out of sys.path.
        command = [
            sys.executable,
            "-P",
            str(Path(__file__).with_name("compiler_process.py")),
            folder,
        ]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        result = Path(folder, "result.json")
        if not result.is_file():
            tail = " ".join(done.stderr.split())[-300:].rstrip(". ")
            raise OSError(
                f"{trt.__name__} {trt.__version__} ended with status {done.returncode} while"
                f" building plan {name}, expected a plan ({tail or 'without a message'})."
            )
        outcome = read_json(result)
        if "error" in outcome:
            raise ERRORS[outcome["error"]](outcome["message"])
        if not outcome["reproducible"]:
            log.info("plan %s: its bytes may differ from build to build on this system", name)
        return Path(folder, "plan").read_bytes(), Path(folder, "layers").read_text()
