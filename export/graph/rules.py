"""Rewriting rules for traced graphs (onnx_ir): each keeps the meaning and drops nodes.

A rule takes a graph, changes it in place and returns how often it applied.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def static_reshapes(graph: Any) -> int:
    """A Reshape's target becomes a constant where 0 and one -1 can say it.

    0 copies the input's dimension at the same place; -1 takes what remains. Where they cannot, the
    target is the Shape of an earlier tensor that has it. The arithmetic that made it falls away.
    """
    import onnx_ir as ir

    known: dict[tuple[str, ...], Any] = {}
    for value in graph.inputs:
        known.setdefault(_shape(value), value)
    done = 0
    for node in list(graph):
        if node.op_type == "Reshape" and node.inputs[1].const_value is None:
            sizes = _sizes(node.inputs[0].shape, node.outputs[0].shape)
            twin = known.get(_shape(node.outputs[0]))
            if sizes is not None:
                shape = ir.tensor(np.array(sizes, np.int64))
                made = ir.node("Constant", [], attributes={"value": shape})
                made.outputs[0].const_value = shape
            elif twin is not None:
                made = ir.node("Shape", [twin])
            else:
                continue
            made.outputs[0].name = f"{node.outputs[0].name}_sizes"
            made.outputs[0].shape = ir.Shape([len(node.outputs[0].shape)])
            made.outputs[0].dtype = ir.DataType.INT64
            graph.insert_before(node, made)
            node.replace_input_with(1, made.outputs[0])
            node.attributes.pop("allowzero", None)
            done += 1
        for value in node.outputs:
            if value.shape is not None:
                known.setdefault(_shape(value), value)
    return done


def _sizes(source: Any, target: Any) -> list[int] | None:
    """A Reshape's target in numbers, 0 and at most one -1."""
    if source is None or target is None:
        return None
    sizes = []
    for index, size in enumerate(target):
        if isinstance(size, int):
            sizes.append(size)
        else:
            sizes.append(0 if index < len(source) and source[index] == size else -1)
    return sizes if sizes.count(-1) < 2 else None


def _shape(value: Any) -> tuple[str, ...]:
    """A shape to compare by; a tensor of unknown shape has its own."""
    return (value.name,) if value.shape is None else tuple(str(size) for size in value.shape)


def unscalar(graph: Any) -> int:
    """A vector of one number, made a scalar and a vector again, is the vector."""
    done = 0
    for node in list(graph):
        source = node.inputs[0].producer() if node.op_type == "Reshape" else None
        if source is None or source.op_type != "Squeeze" or _numbers(node.inputs[1]) != [-1]:
            continue
        vector = source.inputs[0]
        if vector.shape is not None and list(vector.shape) == [1]:
            node.outputs[0].replace_all_uses_with(vector)
            done += 1
    return done


def untranspose(graph: Any) -> int:
    """A weight that the trace transposed twice is taken as it is stored.

    The module is given w.t() of an input [in, out]; Linear transposes it again, by a Transpose or
    by Gemm's transB.
    """
    done = 0
    for value in graph.inputs:
        for first in [use.node for use in value.uses()]:
            if not _swaps(first):
                continue
            for second, index in [(use.node, use.idx) for use in first.outputs[0].uses()]:
                if _swaps(second):
                    second.outputs[0].replace_all_uses_with(value)
                    done += 1
                elif second.op_type == "Gemm" and index == 1:
                    second.replace_input_with(1, value)
                    if second.attributes.pop("transB", None) is None:
                        raise AssertionError("a Gemm on a transposed weight without transB")
                    done += 1
    return done


def unsqueeze_once(graph: Any) -> int:
    """The parts of a Split that are all unsqueezed alike are parts of an unsqueezed whole.

    A block's six modulations are [B, D] cut from [B, 6 D], each made [B, 1, D]: one node for six.
    """
    import onnx_ir as ir

    done = 0
    for node in list(graph):
        if node.op_type != "Split" or len(node.inputs) != 1:
            continue
        axis, rank = node.attributes["axis"].as_int(), _rank(node.inputs[0])
        uses = [use.node for value in node.outputs for use in value.uses()]
        if not uses or rank is None or any(use.op_type != "Unsqueeze" for use in uses):
            continue
        places = [_numbers(use.inputs[1]) or [] for use in uses]
        if any(len(found) != 1 or found != places[0] for found in places):
            continue
        place = places[0][0]
        if not 0 <= place <= axis % rank:
            continue
        whole = ir.node("Unsqueeze", [node.inputs[0], uses[0].inputs[1]])
        whole.outputs[0].name = f"{node.inputs[0].name}_unsqueezed"
        whole.outputs[0].dtype = node.inputs[0].dtype
        whole.outputs[0].shape = _unsqueezed(node.inputs[0].shape, place)
        graph.insert_before(node, whole)
        node.replace_input_with(0, whole.outputs[0])
        node.attributes["axis"] = ir.AttrInt64("axis", axis % rank + 1)
        for value in node.outputs:
            value.shape = _unsqueezed(value.shape, place)
            for use in [use.node for use in value.uses()]:
                use.outputs[0].replace_all_uses_with(value)
        done += 1
    return done


def uncat(graph: Any) -> int:
    """A Slice that gives back one part of a two-part Concat is that part.

    A sparse single block joins attention and FFN for a projection that takes them apart again.
    """
    done = 0
    for node in list(graph):
        source = node.inputs[0].producer() if node.op_type == "Slice" else None
        if source is None or source.op_type != "Concat" or len(source.inputs) != 2:
            continue
        numbers = [_numbers(value) for value in node.inputs[1:]]
        rank = _rank(node.inputs[0])
        if len(numbers) < 3 or None in numbers or rank is None:
            continue
        start, end, axis, *step = [vector[0] for vector in numbers if vector]
        if step not in ([], [1]):
            continue
        axis %= rank
        first, second = source.inputs
        middle = first.shape[axis] if first.shape is not None else None
        if axis != source.attributes["axis"].as_int() % rank or not isinstance(middle, int):
            continue
        if (start, end) == (0, middle):
            node.outputs[0].replace_all_uses_with(first)
        elif start == middle and end >= middle + _size(second, axis):
            node.outputs[0].replace_all_uses_with(second)
        else:
            continue
        done += 1
    return done


def _swaps(node: Any) -> bool:
    """Whether a node transposes a matrix."""
    return node.op_type == "Transpose" and list(node.attributes["perm"].value) == [1, 0]


def _numbers(value: Any) -> list[int] | None:
    """A constant vector's numbers."""
    constant = None if value is None else value.const_value
    return None if constant is None else [int(n) for n in constant.numpy().reshape(-1)]


def _rank(value: Any) -> int | None:
    return None if value.shape is None else len(value.shape)


def _size(value: Any, axis: int) -> int:
    """A static dimension, or more than any end of a Slice."""
    size = value.shape[axis] if value.shape is not None else None
    return size if isinstance(size, int) else 1 << 63


def _unsqueezed(shape: Any, place: int) -> Any:
    import onnx_ir as ir

    if shape is None:
        return None
    sizes = list(shape)
    sizes.insert(place, 1)
    return ir.Shape(sizes)
