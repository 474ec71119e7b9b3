"""A product by a quantised weight in ONNX Runtime on the CPU, against float32.

    python -m scripts.bench.products [--json FILE]

x [T, K] @ w [K, N] + b on one thread, weights as constants: the functions that bundles carry, with
all that they do to x and to what comes out. Formats take turns; ratios are medians over turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from scripts.figures import cpu_session, in_turns, machine, options, ratios, write_figures

SIZES = ((1024, 4096, 512), (3072, 3072, 512), (4096, 1024, 512), (1024, 4096, 64), (128, 512, 32))
FORMATS = ("float32", "int8", "int4")


def session_of(form: str, weight: np.ndarray, bias: np.ndarray) -> Any:
    """A session of x @ weight + bias, the weight in a format."""
    import onnx
    import torch
    from onnx import TensorProto, helper, numpy_helper

    from export.op.schema import DOMAIN
    from export.quant.formats import FORMATS as ROWS
    from export.quant.products import MICROSOFT, functions
    from export.quant.weights import pack

    rows, columns = weight.shape
    constants, nodes, made = {"b": bias}, [], []
    if form == "float32":
        constants["w"] = weight
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y0"])]
    else:
        parts = pack(ROWS[form], torch.from_numpy(weight))
        constants |= {f"w{s}": p.float().numpy() if s else p.numpy() for s, p in parts.items()}
        made = functions(ROWS[form])
        left = ["x"] if form == "int4" else ["q", "scale"]
        sizes = {"k": rows, "n": columns} if form == "int4" else {}
        given = [*left, *(f"w{suffix}" for suffix in parts)]
        if form != "int4":
            nodes = [helper.make_node(f"Quantize_{form}", ["x"], left, domain=DOMAIN)]
        nodes.append(helper.make_node(f"Product_{form}", given, ["y0"], domain=DOMAIN, **sizes))
    nodes.append(helper.make_node("Add", ["y0", "b"], ["y"]))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "product",
        [info("x", TensorProto.FLOAT, ["T", rows])],
        [info("y", TensorProto.FLOAT, ["T", columns])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 20), (DOMAIN, 1), (MICROSOFT, 1))]
    model: onnx.ModelProto = helper.make_model(
        graph, functions=made, opset_imports=opsets, ir_version=10
    )
    return cpu_session(model.SerializeToString(), 1)


def timed(session: Any, x: np.ndarray) -> Callable[[int], float]:
    """One run's milliseconds."""

    def run(turn: int) -> float:
        began = time.perf_counter()
        session.run(None, {"x": x})
        return 1000 * (time.perf_counter() - began)

    return run


def main() -> None:
    """Measure, print, write."""
    parser = options(__doc__, "cpu/quantised_products.json")
    arguments = parser.parse_args()
    generator, rows = np.random.default_rng(0), []
    for inner, outer, tokens in SIZES:
        x = generator.standard_normal((tokens, inner)).astype(np.float32)
        weight = (generator.standard_normal((inner, outer)) * inner**-0.5).astype(np.float32)
        bias = generator.standard_normal(outer).astype(np.float32)
        sessions = {form: session_of(form, weight, bias) for form in FORMATS}
        found = in_turns({form: timed(each, x) for form, each in sessions.items()}, runs=9)
        exact = x @ weight
        for form in FORMATS:
            answer = sessions[form].run(None, {"x": x})[0] - bias
            error = float(np.linalg.norm(answer - exact) / np.linalg.norm(exact))
            rows.append(
                {
                    "k": inner,
                    "n": outer,
                    "tokens": tokens,
                    "format": form,
                    "ms": round(statistics.median(found[form]), 3),
                    **ratios(found["float32"], found[form]),
                    "error": round(error, 5),
                }
            )
            print(rows[-1], flush=True)
    facts = machine(1, "onnxruntime")
    write_figures(arguments.json, "scripts.bench.products", {**facts, "rows": rows})


if __name__ == "__main__":
    main()
