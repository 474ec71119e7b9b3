"""Plan files made executable by TensorRT or TensorRT-RTX, whose Python interface is the same."""

from __future__ import annotations

from typing import Any


class Loader:
    """Loads plans: bytes and path -> execution context. Engines live as long as its runtime."""

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.logger = trt.Logger(trt.Logger.WARNING)
        self.runtime = trt.Runtime(self.logger)
        self.engines: list[Any] = []

    def __call__(self, data: bytes, path: str) -> Any:
        """Deserialise a plan and make its context; ValueError names the plan and the cure."""
        trt = self.trt
        if hasattr(self.runtime, "get_engine_validity"):
            validity, reasons = self.runtime.get_engine_validity(data)
            if validity == trt.EngineValidity.INVALID:
                raise self.unfit(path, f"diagnostics {reasons}")
        engine = self.runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self.unfit(path, "it cannot be deserialised")
        self.engines.append(engine)
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(engine, "create_runtime_config"):
            return engine.create_execution_context(managed)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is not None:
            # LAZY would swap kernels in while images are generated, and change their last bits.
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return engine.create_execution_context(config)

    def unfit(self, path: str, reason: str) -> ValueError:
        """The error for a plan that the library refuses."""
        title = f"{self.trt.__name__} {self.trt.__version__}"
        return ValueError(
            f"{title} refuses the plan {path} on this GPU ({reason}), expected one built for it;"
            " export again with --sm, or use --backend ort."
        )
