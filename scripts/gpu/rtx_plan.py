"""Does a TensorRT-RTX plan for this GPU build, pass its validity check, load and run?

    python -m scripts.gpu.rtx_plan [PLAN]

Without PLAN a matmul is built, portable and, where it is offered, for this GPU. Prints one line per
plan; exit code 0 where one ran, 1 where none did, 2 where the library or the GPU is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def matmul(trt: Any, logger: Any) -> bytes | None:
    """A plan of y = x w, portable, or None where the builder refuses."""
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    x = network.add_input("x", trt.float16, (64, 64))
    w = network.add_input("w", trt.float16, (64, 64))
    kind = trt.MatrixOperation.NONE
    layer = network.add_matrix_multiply(x, kind, w, kind)
    layer.get_output(0).name = "y"
    network.mark_output(layer.get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    return None if plan is None else bytes(plan)


def attempt(trt: Any, logger: Any, plan: bytes) -> str:
    """What happened, up to the first step that failed; "ran" where all went well."""
    runtime = trt.Runtime(logger)
    if hasattr(runtime, "get_engine_validity"):
        validity = runtime.get_engine_validity(plan)
        print(f"validity: {validity}")
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return "does not load"
    context = engine.create_execution_context()
    if context is None:
        return "loads, but gives no execution context (its kernels do not compile here)"
    import numpy as np

    from runtime.cuda.device import Device

    device = Device()
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        shape = tuple(engine.get_tensor_shape(name))
        if min(shape, default=1) < 0:
            return "loads (a plan with dynamic shapes is not run here)"
        address = device.malloc(int(np.prod(shape)) * 4)
        context.set_tensor_address(name, address)
    if not context.execute_async_v3(device.stream):
        return "loads, but does not start"
    device.synchronize()
    return "ran"


def main() -> int:
    """Build or read a plan, try it."""
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        print(f"error: tensorrt_rtx is missing ({error}); carry its wheels, or leave this out.")
        return 2
    from runtime.cuda.device import bindings, capability

    try:
        sm = capability(bindings())
    except (ImportError, OSError) as error:
        print(f"error: {error}")
        return 2
    logger = trt.Logger(trt.Logger.WARNING)
    plan = Path(sys.argv[1]).read_bytes() if len(sys.argv) > 1 else matmul(trt, logger)
    if plan is None:
        print(f"tensorrt_rtx {trt.__version__} on compute capability {sm}: no plan was built")
        return 1
    found = attempt(trt, logger, plan)
    print(f"tensorrt_rtx {trt.__version__} on compute capability {sm}: the plan {found}")
    return 0 if found == "ran" else 1


if __name__ == "__main__":
    raise SystemExit(main())
