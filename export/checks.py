"""What `d2m export` refuses before it reads a weight: options, libraries, GPUs, directories."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path

from runtime.files.extras import need
from runtime.files.kinds import not_a

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_arguments(
    source: Path,
    out: Path,
    dtype: str,
    storage: str | None,
    plan_dtype: str | None,
    sm: Sequence[int],
    plans: bool,
) -> None:
    """Refuse what cannot work before anything is imported or read."""
    for option, value in (("dtype", dtype), ("storage", storage), ("plan_dtype", plan_dtype)):
        if value is not None and value not in DTYPES:
            raise ValueError(f"the {option} is {value!r}, expected one of {', '.join(DTYPES)}.")
    if sm and not plans:
        raise ValueError(
            f"--sm {','.join(map(str, sm))} is given without --trt or --trt-rtx, expected one of"
            " them: compute capabilities are of plans."
        )
    if not source.is_dir():
        cure = "make one with: d2m convert DENSE -o NEW"
        raise FileNotFoundError(not_a("a pipeline directory", source, cure))
    if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise ValueError(
            f"{out} exists and is no bundle, expected a new name or a bundle to replace; choose"
            " another output directory."
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, expected a directory's name; choose another output.")
    if out.exists() and out.resolve() == source.resolve():
        raise ValueError(f"{out} is the pipeline itself, expected another output directory.")


def check_quant(quant: str, keep: Sequence[str], dtype: str, kernels: bool) -> None:
    """Refuse formats that do not exist, and what quantised bundles cannot have."""
    from export.quant.formats import format_of

    if format_of(quant) is None:
        if keep:
            raise ValueError(
                f"--keep {','.join(keep)} is given without --quant, expected a format: without one"
                " every weight is kept."
            )
        return
    if dtype != "fp32":
        raise ValueError(
            f"--dtype is {dtype} with --quant {quant}, expected fp32: graphs compute in float32"
            " around quantised products; plans compute in bf16."
        )
    if kernels:
        raise ValueError(
            f"--cubins or --plugin is given with --quant {quant}, expected neither: the kernels"
            " read weights of 16 bits."
        )


def check_plugin(trt: bool, trt_rtx: bool) -> None:
    """Refuse --plugin where it has no meaning or its libraries are missing."""
    if trt_rtx or not trt:
        raise ValueError(
            f"--plugin is given {'with --trt-rtx' if trt_rtx else 'without --trt'}, expected --trt"
            " alone: TensorRT-RTX takes no Python plugins."
        )
    from d2m.kernels.package import triton_version
    from export.plans.plugins import load_plugin_api

    load_plugin_api()
    triton_version()


def need_extra() -> None:
    """ImportError naming the extra where one of its libraries is missing."""
    try:
        for name in ("torch", "diffusers", "transformers", "accelerate", "onnxscript", "onnx_ir"):
            importlib.import_module(name)
    except ImportError as error:
        said = "exporting needs torch, diffusers and onnx"
        raise ImportError(need("export", said, error)) from error


def check_top_k(source: Path, top_k: Sequence[int]) -> list[int]:
    """The numbers of experts to export, ascending, the checkpoint's own among them."""
    from export.families.configs import config

    values = config(source, "transformer")
    experts, own = values.get("num_experts", 12), values.get("top_k", 2)
    wrong = [k for k in top_k if type(k) is not int or not 0 <= k <= experts]
    if wrong:
        raise ValueError(
            f"--top-k names {wrong[0]}, expected numbers of experts from 0 to {experts}, which is"
            f" what {source} has."
        )
    return sorted({own, *top_k})


def plan_apis(trt: bool, trt_rtx: bool, targets: Sequence[Sequence[int]]) -> list[str]:
    """Which libraries build plans, for every target's compute capabilities.

    A missing library is an ImportError, a GPU that it does not build for a ValueError or OSError:
    now rather than after minutes of tracing.
    """
    from export.plans.compiler import check_sm, load_api

    apis = [load_api("auto")] if trt else []
    if trt_rtx:
        apis.append(load_api("tensorrt_rtx"))
    for api, sm in itertools.product(apis, targets):
        check_sm(api, sm)
    return sorted({api.__name__ for api in apis})
