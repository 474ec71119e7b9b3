"""The backends: which there are, what each needs, and which one fits this machine and bundle."""

from __future__ import annotations

# name -> "module:factory"; factory(bundle, component, *, threads) -> Executor.
BACKENDS = {
    "ort": "runtime.ort.component:open_component",
    "ort-cuda": "runtime.ort.component:open_component_cuda",
    "trt-rtx": "runtime.trt.component:open_component_rtx",
    "trt": "runtime.trt.component:open_component",
}

# The Python module that a backend runs on, and its plans were built with, and the extra that
# installs it ("": it is part of every installation).
MODULES = {
    "ort": ("onnxruntime", ""),
    "ort-cuda": ("onnxruntime", "gpu"),
    "trt-rtx": ("tensorrt_rtx", "trt-rtx"),
    "trt": ("tensorrt", "trt"),
}

PLAN_BACKENDS = ("trt-rtx", "trt")

GPU_BACKENDS = (*PLAN_BACKENDS, "ort-cuda")  # in the order in which "auto" asks

TRIED = {  # what a backend was run on so far
    "ort": "x86 CPUs, all tests and figures",
    "ort-cuda": "no GPU so far (on a CPU up to CUDA's provider, with a stand-in for its copies)",
    "trt-rtx": "no GPU so far (plans built and read, launches with a stand-in for the driver)",
    "trt": "nothing so far (TensorRT itself was not available)",
}

CUDA_LIBRARIES = ("libonnxruntime_providers_cuda.so", "onnxruntime_providers_cuda.dll")
EXPERTS = ("auto", "plans", "cubins")
OFFLOADS = ("none", "block")


def check_experts(experts: str, backend: str | None = None) -> None:
    """ValueError for a choice that does not exist, or that a `backend` without plans has not."""
    if experts not in EXPERTS:
        raise ValueError(f"experts is {experts!r}, expected one of {', '.join(EXPERTS)}.")
    if experts != "auto" and backend in ("ort", "ort-cuda"):
        raise ValueError(
            f"experts is {experts!r} but the backend is {backend}, which has no plans, expected"
            " trt-rtx or trt; leave --experts out."
        )


def check_offload(offload: str | None, backend: str | None = None) -> str:
    """ "none" or "block"; ValueError for anything else, or where a backend cannot."""
    offload = "none" if offload is None else offload
    if offload not in OFFLOADS:
        raise ValueError(f"offload is {offload!r}, expected one of {', '.join(OFFLOADS)}.")
    if offload == "block" and backend not in (None, "ort", "ort-cuda"):
        raise ValueError(
            f"offload is 'block' but the backend is {backend}, which holds all weights on the"
            " device, expected ort or ort-cuda; name one with --backend."
        )
    return offload
