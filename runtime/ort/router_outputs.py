"""Logits of routers as outputs of a block graph: its bytes, with outputs added behind them.

The op `d2m::RoutedExperts` takes the logits as its second input and the experts' weights as its
third. Protocol buffers merge what follows a message into it (read: protobuf's encoding), so a few
bytes at a file's end give its graph more outputs, and no other byte changes. No onnx package.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.bundle.onnx_file import Walk, parts, span, word

OP, DOMAIN = "RoutedExperts", "d2m"
FLOAT = 1  # TensorProto.DataType: routers compute in float32, whatever the blocks do


@dataclass(frozen=True)
class Router:
    """A router in a block graph: the FFN that it is of ("ff"), and its logits [tokens, E]."""

    site: str
    logits: str


def find_routers(model: bytes) -> list[Router]:
    """The routers of a checked graph (runtime.bundle.onnx_file) in the order of its nodes."""
    walk = Walk(model, {})
    routers = []
    for number, value in parts(model, 0, len(model)):
        if number != 7:  # graph
            continue
        for inner, node in parts(model, *span(value)):
            if inner != 1:  # node
                continue
            names: dict[int, list[str]] = {1: [], 4: [], 7: []}  # input, op_type, domain
            for part, text in parts(model, *span(node)):
                if part in names:
                    names[part].append(word(walk, text))
            operators = {name.partition("_")[0] for name in names[4]}  # of RoutedExperts_int8 too
            if operators == {OP} and names[7] == [DOMAIN] and len(names[1]) > 2:
                routers.append(Router(names[1][2].rpartition(".experts.")[0], names[1][1]))
    return routers


def logits_outputs(routers: list[Router]) -> bytes:
    """What makes the logits further outputs of a graph when it stands behind the model's bytes."""
    kind = field(1, varint(1 << 3) + varint(FLOAT))  # TypeProto.tensor_type, its elem_type
    outputs = [field(12, field(1, each.logits.encode()) + field(2, kind)) for each in routers]
    return field(7, b"".join(outputs)) if routers else b""


def field(number: int, data: bytes) -> bytes:
    """A field of bytes: tag, length, data."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])
