"""The process that tries a foreign bundle's graphs: `python -m runtime.trial JSON`.

Started by runtime.bundle.trial, which says why. Limits come first, then the bundle is opened as the
caller will open it and generates the smallest images that run every graph: each number of experts,
all blocks of a group, whole graphs and single blocks. The answer is JSON on stdout; a process that
died gives none.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.block_groups import largest_kappa
from runtime.bundle.control_record import COMPONENT
from runtime.bundle.control_record import KIND as CONTROLNET
from runtime.bundle.directory import Bundle, open_bundle
from runtime.files.tensors import numpy_dtype
from runtime.images.given import example_images
from runtime.pipeline import Pipeline
from runtime.program.executor import open_component

log = logging.getLogger("runtime")
PROMPT = "a photo of a cat"
SIDE = 4  # patches; a graph may need more than one


def set_limits(seconds: int, memory: int | None) -> None:
    """Bound this process; where the system knows no such limits, the log says so."""
    try:
        import resource
    except ImportError:  # Windows
        log.warning("this system limits neither memory nor processor time; the clock alone counts")
        return
    with suppress(OSError):  # Linux: where memory ends, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    wanted = [(resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)]
    wanted += [(resource.RLIMIT_AS, memory)] if memory else []
    for kind, value in wanted:
        try:
            _, hard = resource.getrlimit(kind)
            if hard != resource.RLIM_INFINITY:
                value = min(value, hard)
            resource.setrlimit(kind, (value, hard))
        except (OSError, ValueError) as error:  # macOS takes no limit of addresses
            log.warning("a limit of a trial could not be set (%s)", error)


def try_bundle(job: Mapping[str, Any]) -> None:
    """Generate with every graph; ValueError, OSError or ImportError, one sentence."""
    bundle = open_bundle(job["bundle"], controlnet=None)
    if bundle.digest != job["digest"]:
        raise ValueError(f"bundle {bundle.path} changed while it was checked; open it again.")
    whole = job["backend"] == "ort" and job["offload"] is None
    for mode in ["graph", "blocks"] if whole else [None]:
        if bundle.manifest["kind"] == CONTROLNET:
            try_controlnet(bundle, job, mode)
            continue
        pipeline = Pipeline(
            bundle, job["backend"], threads=job["threads"], mode=mode, offload=job["offload"]
        )
        given = small_size(pipeline.manifest) | example_images(pipeline.manifest)
        for knobs in all_knobs(pipeline.manifest, mode):
            pipeline(PROMPT, steps=1, **given, **knobs)
        for name in bundle.manifest["components"]:
            if name not in pipeline.family.components:
                run_on_zeros(pipeline, name)
        pipeline.close()


def try_controlnet(bundle: Bundle, job: Mapping[str, Any], mode: str | None) -> None:
    """A ControlNet's graphs, on zeros for a small image."""
    options = {"threads": job["threads"], "mode": mode, "offload": job["offload"]}
    executor: Any = open_component(bundle, COMPONENT, job["backend"], **options)
    sizes = {"batch": 1, "image_tokens": SIDE**2, "text_tokens": SIDE, "tokens": SIDE**2 + SIDE}
    inputs = {}
    for name, row in bundle.component(COMPONENT)["inputs"].items():
        shape = [sizes.get(size, SIDE) if isinstance(size, str) else size for size in row["shape"]]
        inputs[name] = np.zeros(shape, numpy_dtype(row["dtype"]))
    first = next(iter(executor.values(inputs).values()))
    executor.add([first, first])


def small_size(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The height and width of a small image, pixels."""
    factor = manifest["latents"]["vae_scale_factor"] * manifest["latents"]["patch"]
    usual = manifest["defaults"]
    return {name: min(usual[name], SIDE * factor) for name in ("height", "width")}


def all_knobs(manifest: Mapping[str, Any], mode: str | None) -> Iterator[dict[str, Any]]:
    """Every number of experts; all blocks of groups, for whole graphs have them in branches."""
    yield {}
    if mode == "graph":
        groups = [row for row in manifest["components"].values() if row.get("groups")]
        if groups:
            yield {"kappa": min(map(largest_kappa, groups))}
    else:
        default = manifest.get("top_k")
        yield from ({"top_k": k} for k in manifest.get("top_k_choices") or () if k != default)


def run_on_zeros(pipeline: Pipeline, component: str) -> None:
    """A component that no image of a prompt needs; sizes that do not fit it are no matter."""
    rows = pipeline.bundle.component(component)["inputs"]
    side = max(small_size(pipeline.manifest).values())
    inputs = {
        name: np.zeros([1 if n == "batch" else n if isinstance(n, int) else side for n in shape])
        for name, shape in ((name, row["shape"]) for name, row in rows.items())
    }
    pipeline.executor(component)
    with suppress(ValueError):
        pipeline.execute(component, inputs)


def main(text: str) -> int:
    """Try the bundle of a job; the answer is printed."""
    job = json.loads(text)
    set_limits(job["seconds"], job["memory"])
    try:
        try_bundle(job)
    except (ValueError, ImportError, OSError, MemoryError) as error:
        kinds = ("ValueError", ValueError), ("ImportError", ImportError), ("OSError", OSError)
        kind = next((name for name, kind in kinds if isinstance(error, kind)), "MemoryError")
        print(json.dumps({"error": kind, "text": str(error) or "there is not enough memory"}))
        return 1
    print(json.dumps({"passed": job["digest"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
