"""What a compiled plan runs: the builder's layer dump, read and judged without a GPU.

TensorRT-RTX prints the kernels of a plan in one verbose log message that begins with `Layers:`,
also when it builds ahead of time on a machine without a driver (measured, 1.7.1). TensorRT proper
gives the same records as JSON through an engine inspector. A diffusion block's plan is good when
its attention is one fused kernel and nothing in it waits for the host.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Kernel types and names seen in dumps of TensorRT-RTX 1.7.1 for graphs made to contain them:
# an ONNX `If` gives a copy named copy_d2h..., cjmp and jmp; a shape that depends on data gives
# DeviceToShapeHost between train stations.
CONDITIONAL = {"cjmp", "jmp", "Condition", "ConditionalInput", "ConditionalOutput"}
HOST_TYPES = {"DeviceToShapeHost", "ShapeHostToDevice"}
HOST_NAMES = ("copy_d2h", "copy_h2d", "DevicetoShapeHostCopy", "ShapeHostToDeviceCopy")
# Bookkeeping on the host or between streams: no work on the device.
NO_KERNEL = {"shape_call", "TrainStation", "signal", "wait", "NoOp"}
# `_gemm_mha_v2_0x...`: the whole of softmax(q k) v. Never matched against ONNX names.
FUSED_ATTENTION = re.compile(r"(^|_)(gemm_)?f?mha(_|$)|flash_?att", re.IGNORECASE)
QUANTISED = {"FP8", "FP4E2M1"}
HALVES = ("bfloat16", "float16")

_LINE = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), (?P<rest>.*)$", re.MULTILINE)
_METADATA = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TYPES = re.compile(r"Datatype: (\w+)")
_TACTIC = re.compile(r"TacticName: ([^,]*),")


@dataclass(frozen=True)
class Layer:
    """One step of a plan: TensorRT's name and kind of it, and the ONNX nodes it came from."""

    name: str
    type: str
    tactic: str
    nodes: tuple[str, ...]
    reads: tuple[str, ...] = ()  # the types of its inputs, as TensorRT calls them

    @property
    def quantised(self) -> bool:
        """Whether the step is a product of numbers of 8 or 4 bits."""
        return self.type == "gemm" and {*self.reads[:2]} <= QUANTISED and len(self.reads) > 1

    @property
    def kernel(self) -> bool:
        """Whether the step launches work on the device."""
        return self.type not in NO_KERNEL

    @property
    def attention(self) -> bool:
        """Whether the step is one fused attention kernel."""
        return self.kernel and any(map(FUSED_ATTENTION.search, (self.name, self.tactic)))

    @property
    def conditional(self) -> bool:
        """Whether the step jumps, or belongs to an `If`."""
        return self.type in CONDITIONAL

    @property
    def host_copy(self) -> bool:
        """Whether the step copies between device and host, which stalls the stream."""
        return self.type in HOST_TYPES or any(part in self.name for part in HOST_NAMES)


def layers(dump: str | Iterable[str]) -> list[Layer]:
    """The layers in a verbose build log (a text, or its messages) or an inspector's JSON.

    Raises ValueError where there is no dump: the plan was built without detailed verbosity.
    """
    text = dump if isinstance(dump, str) else "\n".join(dump)
    if text.lstrip().startswith("{"):
        return [from_json(row) for row in json.loads(text).get("Layers", [])]
    start = re.search(r"^Layers:$", text, re.MULTILINE)
    if start is None:
        raise ValueError(
            "the build log holds no 'Layers:' dump, expected one from a builder with a verbose"
            " logger and detailed profiling verbosity; build the plan with export.plans.build."
        )
    body = text[start.end() :]
    end = re.search(r"^I/O Tensors:", body, re.MULTILINE)
    return [
        Layer(
            match["name"],
            match["type"],
            tactic[1].strip() if (tactic := _TACTIC.search(match["rest"])) else "",
            tuple(_METADATA.findall(match["rest"])),
            tuple(_TYPES.findall(re.split("Constants: |Outputs: ", match["rest"])[0])),
        )
        for match in _LINE.finditer(body[: end.start()] if end else body)
    ]


def host_tensors(dump: str) -> list[str]:
    """Inputs and outputs that a plan expects in host memory (shapes as values), by the dump."""
    return re.findall(r"^ ?Name: ([^,]+), IOMode: .*Location: Host", dump, re.MULTILINE)


def from_json(row: Any) -> Layer:
    """One record of an engine inspector (a bare name where verbosity was not detailed)."""
    if isinstance(row, str):
        return Layer(row, "", "", ())
    nodes = tuple(_METADATA.findall(row.get("Metadata", "") or ""))
    return Layer(row.get("Name", ""), row.get("LayerType", ""), row.get("TacticName", ""), nodes)


def summary(found: Sequence[Layer]) -> dict[str, int]:
    """Counts for the manifest: kernels, fused attention kernels, conditionals, host copies; of
    plans in 8 or 4 bits the products of such numbers too."""
    products = sum(layer.quantised for layer in found)
    return {
        "kernels": sum(layer.kernel for layer in found),
        "fused_attention": sum(layer.attention for layer in found),
        "conditionals": sum(layer.conditional for layer in found),
        "host_copies": sum(layer.host_copy for layer in found),
        **({"quantised_products": products} if products else {}),
    }


def check_plan(
    name: str, found: Sequence[Layer], *, dtype: str = "bfloat16", attentions: int = 0
) -> dict[str, int]:
    """Refuse a plan that branches, waits for the host, or leaves an attention unfused.

    `attentions`: how many attentions the graph holds. In float32 none is fused by any release
    (documented, and measured: IAttention answers "no dedicated kernel"), so they are only required
    in half precision. Returns `summary`; raises ValueError naming plan and layer.
    """
    if not found:
        raise ValueError(f"plan {name} has an empty layer dump, expected at least one layer.")
    for layer in found:
        if layer.conditional:
            raise ValueError(
                f"plan {name} branches in layer {layer.name!r}, expected a plan without"
                " conditionals; take the If out of the block's graph, the host decides."
            )
        if layer.host_copy:
            raise ValueError(
                f"plan {name} copies between device and host in layer {layer.name!r}, expected"
                " none; a size in the block's graph depends on data."
            )
    counts = summary(found)
    if dtype in HALVES and counts["fused_attention"] < attentions:
        raise ValueError(
            f"plan {name} fuses {counts['fused_attention']} of {attentions} attentions, expected"
            " all of them; keep the graph's form MatMul, Softmax, MatMul in one half type."
        )
    return counts
