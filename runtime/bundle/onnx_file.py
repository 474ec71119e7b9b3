"""An ONNX file read as far as safety needs, before ONNX Runtime opens it; no onnx package.

ONNX Runtime opens whatever file an external tensor names, copies the body of a function to every
call of it, and would run a loop that never ends. So the file is walked first, as the protocol
buffer that it is (read: protobuf's encoding, onnx.proto): tensors lie in files that the manifest
lists, within their sizes, and hold as many bytes as their dimensions say; every operator is a
standard one without a loop, a function of the file, or one of a few of ONNX Runtime's; functions
call each other without a circle, and their calls spelled out stay within bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from runtime.bundle.onnx_constants import Body, Key, Step, folding_limit
from runtime.files.checked_json import printable

MAX_BYTES = 1 << 30  # of a graph; weights lie outside it
MAX_NODES = 500_000  # with every function call spelled out
MAX_CALLS = 4096  # of functions, those in functions spelled out: ONNX Runtime inlines one by one
MAX_DEPTH = 16  # graphs in graphs; functions that call functions
SPARE = 64 << 20  # bytes of constants that any file may come to, calls spelled out
ENDLESS = {"Loop", "Scan", "SequenceMap"}
# Of ONNX Runtime's own operators those that compute and no more: others read files or loop.
MICROSOFT = set(
    "Attention BiasGelu FastGelu FusedConv FusedGemm FusedMatMul Gelu GroupNorm GroupQueryAttention"
    " MatMulIntegerToFloat MatMulNBits MoE MultiHeadAttention NhwcConv PackedAttention QMoE"
    " QuickGelu RotaryEmbedding SimplifiedLayerNormalization SkipGroupNorm SkipLayerNormalization"
    " SkipSimplifiedLayerNormalization".split()
)
# TensorProto.DataType -> bytes of an element; what is not here may only lie inside the file.
SIZES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
SIZES |= dict.fromkeys(range(17, 21), 1)  # floats of 8 bits
TYPED = (4, 5, 6, 7, 10, 11)  # fields of a TensorProto with elements one by one


@dataclass
class Cost:
    """What a graph or function holds itself, and which functions it calls how often."""

    nodes: int = 0
    constants: int = 0  # bytes
    calls: dict[Key, int] = field(default_factory=dict)
    body: Body = field(default_factory=Body)


@dataclass
class Walk:
    """A file under way: its bytes, the files its tensors may lie in, bytes named in them so far."""

    data: bytes
    files: Mapping[str, int]
    external: int = 0


@dataclass(frozen=True)
class Totals:
    """A graph that passed: nodes and bytes of constants, calls spelled out; see
    runtime.bundle.onnx_constants."""

    nodes: int
    constants: int
    limit: int = 0  # bytes of a constant that may be computed
    calls: int = 0  # of functions


def check_onnx(data: bytes, files: Mapping[str, int]) -> Totals:
    """Check an ONNX file's bytes; `files` are those its tensors may lie in: name -> bytes.

    Raises ValueError, a clause without a full stop, where ONNX Runtime should not open it.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes, expected at most {MAX_BYTES}")
    walk = Walk(data, files)
    main, functions, seen = Cost(), dict[Key, Cost](), False
    for number, value in parts(data, 0, len(data)):
        if number == 7:
            if seen:
                raise ValueError("it holds two graphs")
            seen = True
            graph(walk, span(value), main, main.body, 0)
        elif number == 20:
            raise ValueError("it holds training information")
        elif number == 25:
            key, cost = function(walk, span(value))
            if key in functions:
                raise ValueError(f"it defines function {shown(key)} twice")
            functions[key] = cost
    if not seen:
        raise ValueError("it holds no graph")
    for cost in (main, *functions.values()):
        for key in cost.calls:
            check_operator(key, functions)
    total = spelled_out(main, functions)
    size = len(data) + sum(files.values())
    if total.constants > SPARE + 4 * size:
        what = f"its constants come to {total.constants} bytes"
        raise ValueError(f"{what}, expected at most {SPARE + 4 * size}")
    bodies = {key: cost.body for key, cost in functions.items()}
    limit = folding_limit(main.body, bodies, size, total.nodes)
    return Totals(total.nodes, total.constants, limit, total.calls)


def check_operator(key: Key, functions: Mapping[Key, Cost]) -> None:
    """Refuse an operator that may never end, or whose doings are not known."""
    domain, name = key
    if domain == "" and name in ENDLESS:
        raise ValueError(f"it has the operator {name}, which may never end")
    if key not in functions and domain and (domain != "com.microsoft" or name not in MICROSOFT):
        raise ValueError(f"it has the operator {shown(key)}, expected one that is known")


def spelled_out(main: Cost, functions: Mapping[Key, Cost]) -> Totals:
    """The main graph with every call replaced by the function's body, counted without doing it."""
    known: dict[Key, Totals] = {}

    def total(cost: Cost, depth: int) -> Totals:
        nodes, constants, calls = cost.nodes, cost.constants, 0
        for key, times in cost.calls.items():
            if key not in functions:
                continue
            if depth >= MAX_DEPTH:
                raise ValueError(f"its functions call each other deeper than {MAX_DEPTH}")
            if key not in known:
                known[key] = total(functions[key], depth + 1)
            nodes += times * known[key].nodes
            constants += times * known[key].constants
            calls += times * (1 + known[key].calls)
        for what, found, most in (
            ("nodes", nodes, MAX_NODES),
            ("function calls", calls, MAX_CALLS),
        ):
            if found > most:
                raise ValueError(f"it comes to {found} {what}, expected at most {most}")
        return Totals(nodes, constants, calls=calls)

    return total(main, 0)


def function(walk: Walk, place: tuple[int, int]) -> tuple[Key, Cost]:
    """FunctionProto: name 1, input 4, output 5, node 7, domain 10, attribute_proto 11."""
    name, domain, cost = "", "", Cost()
    for number, value in parts(walk.data, *place):
        if number == 1:
            name = word(walk, value)
        elif number == 4:
            cost.body.inputs.append(word(walk, value))
        elif number == 5:
            cost.body.outputs.append(word(walk, value))
        elif number == 7:
            node(walk, span(value), cost, cost.body, 0)
        elif number == 10:
            domain = word(walk, value)
        elif number == 11:
            attribute(walk, span(value), cost, Step(), 0)
    return (plain(domain), name), cost


def graph(walk: Walk, place: tuple[int, int], cost: Cost, body: Body, depth: int) -> None:
    """GraphProto: node 1, initializer 5, sparse_initializer 15."""
    if depth > MAX_DEPTH:
        raise ValueError(f"its graphs lie deeper in each other than {MAX_DEPTH}")
    for number, value in parts(walk.data, *place):
        if number == 1:
            node(walk, span(value), cost, body, depth)
        elif number == 5:
            name, count = tensor(walk, span(value), cost)
            body.constants[name] = count
        elif number == 15:
            raise ValueError("it holds a sparse tensor")


def node(walk: Walk, place: tuple[int, int], cost: Cost, body: Body, depth: int) -> None:
    """NodeProto: input 1, output 2, op_type 4, attribute 5, domain 7."""
    name = domain = ""
    step = Step()
    for number, value in parts(walk.data, *place):
        if number == 1:
            step.inputs.append(word(walk, value))
        elif number == 2:
            step.outputs.append(word(walk, value))
        elif number == 4:
            name = word(walk, value)
        elif number == 5:
            attribute(walk, span(value), cost, step, depth)
        elif number == 7:
            domain = word(walk, value)
    step.key = key = (plain(domain), name)
    body.steps.append(step)
    cost.nodes += 1
    cost.calls[key] = cost.calls.get(key, 0) + 1


def attribute(walk: Walk, place: tuple[int, int], cost: Cost, step: Step, depth: int) -> None:
    """AttributeProto: t 5, g 6, tensors 10, graphs 11, sparse_tensor 22 and 23."""
    single: set[int] = set()
    for number, value in parts(walk.data, *place):
        if number in (5, 6):
            if number in single:  # protobuf would merge the two
                raise ValueError("an attribute holds two values")
            single.add(number)
        if number in (5, 10):
            step.elements += tensor(walk, span(value), cost)[1]
        elif number in (6, 11):
            step.graphs.append(Body())
            graph(walk, span(value), cost, step.graphs[-1], depth + 1)
        elif number in (7, 8, 9):  # floats, ints, strings: a Constant's value
            step.elements += 1 if isinstance(value, int) else value[1] - value[0] + 1
        elif number in (22, 23):
            raise ValueError("it holds a sparse tensor")


def tensor(walk: Walk, place: tuple[int, int], cost: Cost) -> tuple[str, int]:
    """TensorProto: dims 1, data_type 2, name 8, raw_data 9, external_data 13, data_location 14.

    Returns its name and its number of elements.
    """
    dims: list[int] = []
    name = ""
    kind = raw = typed = location = 0
    outside: dict[str, str] = {}
    for number, value in parts(walk.data, *place):
        if number == 1:
            dims += [value] if isinstance(value, int) else varints(walk.data, *value)
        elif number in (2, 14):
            if not isinstance(value, int):
                raise ValueError("a tensor's type is no number")
            kind, location = (value, location) if number == 2 else (kind, value)
        elif number == 8:
            name = word(walk, value)
        elif number == 9:
            start, end = span(value)
            raw += end - start
        elif number in TYPED:
            typed += 8 if isinstance(value, int) else value[1] - value[0] + 1
        elif number == 13:
            entry(walk, span(value), outside)
    if len(dims) > 64 or any(dim >= 1 << 62 for dim in dims):  # negative ones are larger
        raise ValueError(f"a tensor has dimensions {str(dims)[:60]}")
    count = math.prod(dims)
    if outside or location:
        walk.external += external(walk, outside, count, kind)
        if walk.external > 2 * sum(walk.files.values()) + SPARE:
            raise ValueError("its tensors name more bytes than the files beside it have")
    elif raw and raw * 8 < count or (raw and kind in SIZES and raw != count * SIZES[kind]):
        raise ValueError(f"a tensor of {count} elements fills {raw} bytes")
    elif not raw and count > 8 * typed:
        raise ValueError(f"a tensor of {count} elements fills {typed} bytes")
    cost.constants += raw + 8 * typed
    return name, count


def entry(walk: Walk, place: tuple[int, int], found: dict[str, str]) -> None:
    """StringStringEntryProto: key 1, value 2."""
    key = value = ""
    for number, part in parts(walk.data, *place):
        if number == 1:
            key = word(walk, part)
        elif number == 2:
            value = word(walk, part)
    if key in found:
        raise ValueError(f"an external tensor names its {printable(key)[:40]} twice")
    found[key] = value


def external(walk: Walk, row: Mapping[str, str], count: int, kind: int) -> int:
    """Bytes of a tensor that lies in another file: a listed one, wholly within it."""
    name = row.get("location", "")
    if name not in walk.files:
        known = ", ".join(sorted(walk.files)) or "none"
        raise ValueError(f"a tensor lies in {printable(name)[:80]!r}, expected one of: {known}")
    if kind not in SIZES:
        raise ValueError(f"an external tensor is of type {kind}, expected a plain number type")
    numbers = [row.get("offset", "0"), row.get("length", str(count * SIZES[kind]))]
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
        raise ValueError(f"an external tensor lies at {printable(str(numbers))[:60]}")
    offset, length = map(int, numbers)
    if length != count * SIZES[kind] or offset + length > walk.files[name]:
        raise ValueError(
            f"a tensor of {count} elements lies at {offset} to {offset + length} of {name}, which"
            f" has {walk.files[name]} bytes"
        )
    return length


# ---------------------------------------------------------------- protocol buffers


def parts(data: bytes, at: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """(field number, number or place of bytes) of every field of a message."""
    while at < end:
        tag = data[at]
        at += 1
        if tag > 127:
            tag, at = varint(data, at - 1, end)
        wire = tag & 7
        if wire == 2:
            size = data[at] if at < end else 128
            at += 1
            if size > 127:
                size, at = varint(data, at - 1, end)
            if size > end - at:
                raise ValueError("it is cut short")
            yield tag >> 3, (at, at + size)
            at += size
        elif wire == 0:
            value, at = varint(data, at, end)
            yield tag >> 3, value
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
            if at > end:
                raise ValueError("it is cut short")
            yield tag >> 3, 0
        else:
            raise ValueError("it is no protocol buffer")


def varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of at most ten bytes, seven bits in each, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError("it is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("it is no protocol buffer")


def varints(data: bytes, at: int, end: int) -> list[int]:
    """Numbers packed end to end; 64 of them at most are read, more are no dimensions."""
    found: list[int] = []
    while at < end and len(found) <= 64:
        value, at = varint(data, at, end)
        found.append(value)
    return found


def span(value: int | tuple[int, int]) -> tuple[int, int]:
    """The place of a message; ValueError where a number stands in its place."""
    if isinstance(value, int):
        raise ValueError("it is no ONNX model")
    return value


def word(walk: Walk, value: int | tuple[int, int]) -> str:
    """A string of at most 1000 bytes."""
    start, end = span(value)
    if end - start > 1000:
        raise ValueError(f"it has a name of {end - start} bytes")
    try:
        return walk.data[start:end].decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it has a name that is no UTF-8") from None


def plain(domain: str) -> str:
    """ai.onnx is the default domain's other name."""
    return "" if domain == "ai.onnx" else domain


def shown(key: Key) -> str:
    """An operator's name, for a message."""
    return printable("::".join(filter(None, key)))[:80] or "without a name"
