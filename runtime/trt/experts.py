"""The routed experts between a block's segments, launched as if they were one more plan.

A plan's whole block carries the experts as stock operators (the portable body). Beside it a target
may have the block cut in two at its experts (`segments`), and packages of kernels to launch there,
one for each size of experts. The executor makes no difference: `ExpertsContext` has the methods of
a plan's execution context. The kernels write into the working memory that all plans of an executor
share, in turn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtime.bundle.kernel_package import (
    ACTIVATIONS,
    DTYPES,
    MANIFEST,
    Kernels,
    op_shapes,
    open_kernels,
)
from runtime.program.backends import check_experts
from runtime.trt.expert_kernels import Call, Cubins, choose_plan

if TYPE_CHECKING:
    from runtime.bundle.directory import Bundle

log = logging.getLogger("runtime")
# The order of a launch's row in the manifest; experts without biases have no b1.
ROLES = ("x", "logits", "w1", "b1", "w2", "y")
MANY = 1 << 20  # tokens; stands for any large number of them


def experts_of(
    bundle: Bundle, component: str, target: str, sm: int, requested: str = "auto"
) -> dict[str, Kernels]:
    """The kernels that a component's experts run on, or none; the choice is said in the log."""
    if all("" in kind["graphs"] for kind in bundle.component(component)["types"].values()):
        return {}
    kernels, reason = choose_experts(bundle, target, sm, requested)
    log.info("%s: experts by %s (%s)", component, "cubins" if kernels else "plans", reason)
    return kernels


def choose_experts(
    bundle: Bundle, target: str, sm: int, requested: str = "auto"
) -> tuple[dict[str, Kernels], str]:
    """Kernels by directory that run the experts of a target's plans on a GPU, or none, and why.

    "plans": whole blocks, the portable body. "cubins": segments and kernels, ValueError or
    FileNotFoundError where they are not there or not for this GPU. "auto": kernels where they fit.
    """
    check_experts(requested)
    if requested == "plans":
        return {}, "requested"
    try:
        kernels = open_experts(bundle, target, sm)
    except (ValueError, FileNotFoundError) as error:
        if requested == "cubins":
            raise
        return {}, f"no kernels: {error}"
    return kernels, f"kernels for sm_{sm}" if requested == "auto" else "requested"


def open_experts(bundle: Bundle, target: str, sm: int) -> dict[str, Kernels]:
    """A target's kernels by directory, which must fit its plans, its experts and the GPU."""
    row = bundle.manifest["plans"][target]
    if not row.get("segments"):
        raise ValueError(
            f"plans {target} of bundle {bundle.path} are of whole blocks, expected segments with"
            " kernels between them; export it again with --cubins."
        )
    folders = sorted({entry["kernels"] for entry in row["experts"].values()})
    opened = {
        folder: open_kernels(bundle.path / folder, bundle.read(f"{folder}/{MANIFEST}"))
        for folder in folders
    }
    for name, entry in row["experts"].items():
        kernels = opened[entry["kernels"]]
        given = kernels.manifest
        inputs = op_shapes(given)["inputs"]
        own = (given.get("activation", ACTIVATIONS[0]), inputs["w1"]["shape"], len(inputs))
        read = row["tensors"][name]["inputs"]
        x, w1 = read[0], read[2]
        wanted = (entry.get("activation", ACTIVATIONS[0]), w1["shape"], len(read))
        if (x["dtype"], *wanted) != (DTYPES[given["dtype"]], *own):
            raise ValueError(
                f"kernels {kernels.path} are for {own[0]} experts {own[1]} in {given['dtype']},"
                f" expected {wanted[0]} experts {wanted[1]} in {x['dtype']} as {name} has them;"
                " export the bundle again."
            )
        for tokens in (1, MANY):
            choose_plan(kernels, sm, tokens, entry["top_k"])
    return opened


class ExpertsContext:
    """The experts of one FFN; `row`: the launch's entry in the manifest's `tensors`, as ROLES."""

    def __init__(self, cubins: Cubins, row: Mapping[str, Any], top_k: int) -> None:
        self.cubins, self.top_k = cubins, top_k
        self.names = [tensor["name"] for tensor in (*row["inputs"], *row["outputs"])]
        self.addresses: dict[str, int] = {}
        self.call: Call | None = None
        self.scratch = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """x [..., D] gives the number of tokens; ValueError where no kernel is for it."""
        if name == self.names[0]:
            self.call = self.cubins.prepare(math.prod(shape[:-1]), self.top_k)
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        """Bytes of scratch."""
        assert self.call is not None, "shapes come first"
        return self.call.scratch

    def set_device_memory(self, address: int, size: int) -> None:
        """Where the scratch lies."""
        assert self.call is not None and size >= self.call.scratch
        self.scratch = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Where a tensor lies, by its name in the graph."""
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Queue the kernels on the device's stream, which must be `stream`."""
        assert self.call is not None and stream == self.cubins.device.stream
        addresses = (self.addresses[name] for name in self.names)
        roles = ROLES if len(self.names) == len(ROLES) else [r for r in ROLES if r != "b1"]
        self.cubins.run(self.call, dict(zip(roles, addresses, strict=True)), self.scratch)
        return True
