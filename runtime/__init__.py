"""From a bundle to an image with numpy and a backend: no torch, no diffusers, no transformers.

    import runtime
    runtime.run("a red circle above a blue square").save("out.png")

Importing this package loads nothing; the first call does. Files in reading order: `pipeline` a
bundle as a callable, `request` the arguments of a call, checked, `sampling` what a call does step
by step, `opened` the bundle and its executors, `tokenizer` prompts to token ids, `image` pixels to
a file, `regenerate` an image made again from its file, `latency_budget` settings for so many
seconds; `trial` the process that tries foreign bundles; `nvtriton` an old name of serve/triton.py.

    files/     the ground: files on disk, with the standard library and numpy alone
    lora/      LoRAs of the dense model, read and placed
    families/  what a family's pipeline does around its models, in numpy
    images/    images as inputs
    bundle/    a bundle is data: opened, checked, signed
    control/   ControlNets
    cuda/      a CUDA device and its memory
    program/   what every backend shares, and the choice of one
    ort/       ONNX Runtime
    trt/       TensorRT and TensorRT-RTX
    inspect/   what a directory holds
    measure/   d2m bench, d2m measure
    serve/     HTTP, NVIDIA Triton
    default/   the bundle that ships with the package
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from runtime.pipeline import Pipeline
    from runtime.sampling import Cancel, Progress, StepCallback

__all__ = ["load", "run"]

_last: dict[tuple[str, str, str | int | None], Pipeline] = {}


def load(
    bundle: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    *,
    threads: int | None = None,
    experts: str = "auto",
    verify: str = "cached",
    key: str | os.PathLike[str] | None = None,
    offload: str | None = None,
    loras: Mapping[str | os.PathLike[str], float] | None = None,
    controlnets: Sequence[str | os.PathLike[str]] = (),
) -> Pipeline:
    """Open a bundle (None: the one that ships with the package) as a reusable pipeline.

    `backend` is "auto" or one of runtime.program.backends.BACKENDS; `threads` defaults to the
    D2M_THREADS environment variable, then to the physical cores this process may use; `experts` is
    "auto", "plans" or "cubins": how plans run the routed experts (see runtime.trt.experts).
    `verify` "full" computes every file's hash anew rather than once for as long as the file
    stays; `key` is a public key's file by which the bundle must be signed (None: that of the
    environment variable D2M_PUBLIC_KEY, if it is set). `offload` "block" streams the
    transformer's weights block by block, for models larger than memory (ort, ort-cuda). `loras`:
    files of LoRAs of the dense model and their strengths, {"style.safetensors": 0.8};
    `pipeline.set_loras` changes them between calls. `controlnets`: bundles of ControlNets, which
    `d2m export CONTROLNET --base BUNDLE` makes; calls then take `control=`.
    Raises FileNotFoundError, ValueError, ImportError or OSError with one sentence.
    """
    from runtime.pipeline import Pipeline

    options: dict[str, Any] = {"threads": threads, "experts": experts, "offload": offload}
    options |= {"loras": loras, "controlnets": controlnets}
    return Pipeline(bundle, backend, verify=verify, key=key, **options)


def run(
    prompt: str | Sequence[str],
    bundle: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    n: int = 1,
    top_k: int | Sequence[int] | None = None,
    kappa: int | Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    budget: float | None = None,
    latents: np.ndarray | None = None,
    negative: str | Sequence[str] | None = None,
    cache: str | None = None,
    image: Any = None,
    strength: float | None = None,
    mask: Any = None,
    control: Any = None,
    references: Any = None,
    control_scale: float | Sequence[float] | None = None,
    control_range: Any = None,
    control_mode: int | Sequence[int] | None = None,
    progress: Progress | None = None,
    callback: StepCallback | None = None,
    cancel: Cancel | None = None,
    output_type: str = "pil",
    **other: Any,
) -> Image | list[Image] | np.ndarray:
    """Generate images of `prompt`: one, or a list of them where n > 1 or `prompt` is a list.

    The named arguments are those of `runtime.pipeline.Pipeline.__call__`, which says what each
    is; what is left out comes from the bundle. The pipeline loaded last stays in memory, so that
    calling again with the same bundle costs no loading.
    """
    arguments = locals()
    for name in ("prompt", "bundle", "backend", "other"):
        del arguments[name]
    from runtime.opened import default_bundle

    path = os.path.realpath(default_bundle() if bundle is None else bundle)
    try:
        changed: Any = os.stat(os.path.join(path, "manifest.json")).st_mtime_ns
    except OSError:
        changed = None
    key = (path, backend, changed)
    if key not in _last:
        pipeline = load(path, backend)
        _last.clear()
        _last[key] = pipeline
    return _last[key](prompt, **arguments, **other)
