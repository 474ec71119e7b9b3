"""The process that builds one plan: `python compiler_process.py FOLDER`, started by
export/plans/compiler.py.

FOLDER holds job.json and model.onnx; the plan, its layer dump and result.json are written there.
It imports TensorRT and nothing of ours, no onnx and no torch, and starts in a quarter second.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

ADDR_NO_RANDOMIZE = 0x0040000  # Linux, sys/personality.h


def steady_addresses() -> bool:
    """Restart this process without address space randomisation; False where that is refused.

    TensorRT-RTX orders some tables of a plan by address. Containers may forbid the system call
    (Docker's default profile does); the plan is then as good, only not the same byte for byte.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    now = libc.personality(0xFFFFFFFF)
    if now == -1:
        return False
    if now & ADDR_NO_RANDOMIZE:
        return True
    if libc.personality(now | ADDR_NO_RANDOMIZE) == -1:
        return False
    os.execv(sys.executable, [sys.executable, "-P", *sys.argv])


def compile_plan(trt: Any, model: bytes, job: dict[str, Any]) -> tuple[bytes, str]:
    """Parse, build; returns plan and layer dump. ValueError or OSError with one sentence."""
    logger = make_logger(trt)
    title = f"{trt.__name__} {trt.__version__}"
    builder = trt.Builder(logger)
    if builder is None:
        raise OSError(f"{title} cannot start a builder ({logger.last()}).")
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if job.get("kernels"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise ValueError(f"{title} cannot read the graph of plan {job['name']}: {refusal(parser)}.")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    if trt.__name__ == "tensorrt_rtx" and job["sm"]:
        config.num_compute_capabilities = len(job["sm"])
        for index, number in enumerate(job["sm"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), index)
    if job["shapes"]:
        profile = builder.create_optimization_profile()
        for tensor, points in job["shapes"].items():
            profile.set_shape(tensor, *points)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"{title} cannot build plan {job['name']} ({logger.last()}).")
    data = bytes(plan)
    return data, logger.dump or inspect(trt, logger, data)


def register_plugins(job: dict[str, Any]) -> None:
    """With job["kernels"] {root, folder, plan}: TensorRT plugins made from a package of kernels.

    Only then something of ours is imported here; export/plans/plugins.py imports no more than this
    does.
    """
    kernels = job["kernels"]
    sys.path.insert(0, kernels["root"])
    plugins = importlib.import_module("export.plans.plugins")
    manifest = json.loads(Path(kernels["folder"], "kernels.json").read_text())
    plugins.register(*plugins.load_plugin_api(), manifest, kernels["folder"], kernels["plan"])


def refusal(parser: Any) -> str:
    """The parser's first error: which node, in which function, and why."""
    error = parser.get_error(0)
    stack = list(error.local_function_stack())
    where = f" in function {' > '.join(stack)}" if stack else ""
    text = " ".join(str(error.desc()).split())[:300].rstrip(". ")
    node = f"node {error.node_name() or '(unnamed)'!r} ({error.node_operator() or 'no operator'})"
    return f"{node}{where} is refused ({text})"


def inspect(trt: Any, logger: Any, plan: bytes) -> str:
    """The layer dump of a plan through an engine inspector (TensorRT proper; needs the GPU)."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise OSError(f"{trt.__name__} cannot load the plan it has just built ({logger.last()}).")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def make_logger(trt: Any) -> Any:
    """A logger that keeps errors and the layer dump; a build logs megabytes more."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.dump = ""
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                self.dump = message
            elif int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(message.split()))

        def last(self) -> str:
            return (self.errors or ["no reason given"])[0][:300].rstrip(". ")

    return Logger()


def main(folder: Path) -> None:
    """Do the job in `folder`; the outcome, an error too, is in result.json."""
    reproducible = steady_addresses()
    job = json.loads((folder / "job.json").read_text())
    try:
        trt = importlib.import_module(job["api"])
        if job.get("kernels"):
            register_plugins(job)
        plan, dump = compile_plan(trt, (folder / "model.onnx").read_bytes(), job)
    except (ValueError, OSError) as error:
        result = {"error": "OSError" if isinstance(error, OSError) else "ValueError"}
        result["message"] = str(error)
        (folder / "result.json").write_text(json.dumps(result))
        return
    (folder / "plan").write_bytes(plan)
    (folder / "layers").write_text(dump)
    (folder / "result.json").write_text(json.dumps({"reproducible": reproducible}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
