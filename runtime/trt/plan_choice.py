"""Which of a bundle's plans runs here: decided from the manifest before anything is loaded.

A plan loads only on the release of TensorRT that built it, and runs only on GPUs it was built for.
Both are written in the manifest, so that a plan that does not fit is refused with the reason and
the command that rebuilds it, not by a crash inside a library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.bundle.directory import Bundle

FLAGS = {"tensorrt": "--trt", "tensorrt_rtx": "--trt-rtx"}
PORTABLE_FROM = 80  # a portable TensorRT-RTX plan: 8.0, 8.6, 8.9, 12.0 and later (documentation)


def choose_target(bundle: Bundle, api: str, version: str, sm: int | None = None) -> str:
    """The name of the plans to run: built by this very `api` and `version`, for this GPU.

    Plans that multiply the bundle's quantised format go before those in 16 bits, plans for the
    GPU's own compute capability before portable ones. `sm` None (not known yet)
    leaves the GPU out of it. Raises ValueError with every target's reason and the cure.
    """
    plans: Mapping[str, Any] = bundle.manifest.get("plans", {})
    reasons = []
    fitting = []
    for target, row in sorted(plans.items()):
        reason = misfit(row, api, version, sm)
        if reason is None:
            plain = "quant" not in row
            fitting.append((plain, not row["compute_capabilities"], target))
        else:
            reasons.append(f"{target}: {reason}")
    if fitting:
        return min(fitting)[-1]
    what = f"needs other plans than it has ({'; '.join(reasons)})" if reasons else "has no plans"
    wanted = f"{api} {version}" + (f" and compute capability {dotted(sm)}" if sm else "")
    flag = FLAGS[api] + (f" --sm {sm}" if sm and api == "tensorrt_rtx" else "")
    raise ValueError(
        f"bundle {bundle.path} {what}, expected plans for {wanted}; export the pipeline"
        f" that it was made from again, with them: d2m export PIPELINE -o NEW {flag}"
    )


def misfit(row: Mapping[str, Any], api: str, version: str, sm: int | None) -> str | None:
    """Why plans cannot run here, or None."""
    if row["api"] != api:
        return f"built with {row['api']}"
    if row["version"] != version:
        return f"built with release {row['version']}, here is {version}"
    capabilities = [int(number) for number in row["compute_capabilities"]]
    if sm is None or sm in capabilities or (not capabilities and sm >= PORTABLE_FROM):
        return None
    if capabilities:
        known = ", ".join(map(dotted, capabilities))
        return f"built for compute capability {known}, this GPU has {dotted(sm)}"
    return f"built for compute capability {dotted(PORTABLE_FROM)} and up, this GPU has {dotted(sm)}"


def dotted(sm: int) -> str:
    """89 as 8.9, 120 as 12.0."""
    return f"{sm // 10}.{sm % 10}"
