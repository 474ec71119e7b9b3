"""All ways to run d2m::RoutedExperts in ONNX Runtime on the CPU, side by side, in turns.

    python -m scripts.bench.bodies [--runs 15] [--threads 1] [--large] [--json FILE]

The op alone, E = 12, K = 2, H = D / 4, weights as initializers as in a bundle's graph: each body of
export.op.bodies, and ONNX Runtime's own com.microsoft.MoE. Each is first held to the op's
definition in float64 on random and adversarial routings; one that misses it is timed but not
chosen. The chosen body is that of export.graph.blocks; "behind" says how far it is from the fastest
that passes. On one thread the time is the processor's, which other work on the machine stretches
least.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from scripts.figures import cpu_session, in_turns, machine, options, write_figures

EXPERTS, TOP_K = 12, 2
SIZES = ((128, 16), (128, 32), (128, 256), (256, 512), (1024, 512))  # (D, T)
LARGE = ((3072, 512), (1024, 4608))
LIMIT = 2e-6  # of the largest value, as in the op's test
MOE = "com.microsoft.MoE"
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]


def weights(width: int) -> dict[str, np.ndarray]:
    """w1 [E, D, H], b1 [E, H], w2 [E, H, D]."""
    rng, hidden = np.random.default_rng(0), width // 4
    shapes = {"w1": (width, hidden), "b1": (hidden,), "w2": (hidden, width)}
    return {
        name: rng.standard_normal((EXPERTS, *shape), np.float32)
        * np.float32(shape[0] ** -0.5 if len(shape) > 1 else 0.1)
        for name, shape in shapes.items()
    }


def model_of(kind: str, width: int, tokens: int) -> Any:
    """x [T, D], logits [T, E] -> y [T, D] with one body, or ONNX Runtime's own op."""
    import onnx
    from onnx import helper

    from export.op.bodies import with_body
    from export.op.schema import DOMAIN, OP

    held = weights(width)
    if kind == MOE:  # its matrices are [out, in]
        given = {
            "w1": np.ascontiguousarray(held["w1"].transpose(0, 2, 1)),
            "b1": held["b1"],
            "w2": np.ascontiguousarray(held["w2"].transpose(0, 2, 1)),
        }
        fields = {"k": TOP_K, "activation_type": "gelu", "normalize_routing_weights": 0}
        node = helper.make_node(
            "MoE", ["x", "logits", *given], ["y"], domain="com.microsoft", **fields
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    else:
        given = held
        node = helper.make_node(OP, ["x", "logits", *given], ["y"], domain=DOMAIN, top_k=TOP_K)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    kinds = {"x": width, "logits": EXPERTS, "y": width}
    infos = {
        name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["T", size])
        for name, size in kinds.items()
    }
    graph = helper.make_graph(
        [node],
        "op",
        [infos["x"], infos["logits"]],
        [infos["y"]],
        [onnx.numpy_helper.from_array(array, name) for name, array in given.items()],
    )
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model if kind == MOE else with_body(model, kind, tokens=tokens)


def open_run(kind: str, width: int, tokens: int, threads: int) -> Run:
    """The op as a function of x and logits."""
    session = cpu_session(model_of(kind, width, tokens).SerializeToString(), threads)
    return lambda x, logits: session.run(None, {"x": x, "logits": logits})[0]


def routings(tokens: int) -> dict[str, np.ndarray]:
    """Random logits, and those on which implementations differ."""
    rng = np.random.default_rng(2)
    random = rng.standard_normal((tokens, EXPERTS)).astype(np.float32) * 2
    return {
        "random": random,
        "all to the same experts": np.tile(-np.arange(EXPERTS, dtype=np.float32), (tokens, 1)),
        "all equal": np.zeros((tokens, EXPERTS), np.float32),
        "ties": np.round(random),
    }


def misses(run: Run, width: int, tokens: int) -> dict[str, float]:
    """Routings on which the op's definition is missed, and by how much."""
    import torch

    from d2m.model.routing import routed_experts_reference

    x = np.random.default_rng(1).standard_normal((tokens, width)).astype(np.float32)
    held = {name: torch.from_numpy(array).double() for name, array in weights(width).items()}
    found = {}
    for name, logits in routings(tokens).items():
        read = {"x": torch.from_numpy(x).double(), "logits": torch.from_numpy(logits).double()}
        expected = routed_experts_reference(**read, **held, top_k=TOP_K).numpy()
        error = float(np.abs(run(x, logits) - expected).max() / np.abs(expected).max())
        if not error < LIMIT:
            found[name] = error
    return found


def measure(width: int, tokens: int, runs: int, threads: int) -> dict[str, Any]:
    """Medians of every way, taken in turns, and which of them pass."""
    from export.graph.program import BODY
    from export.op.bodies import BODIES

    opened = {kind: open_run(kind, width, tokens, threads) for kind in (*BODIES, MOE)}
    missed = {kind: misses(run, width, tokens) for kind, run in opened.items()}
    x = np.random.default_rng(1).standard_normal((tokens, width)).astype(np.float32)
    logits = routings(tokens)["random"]
    inner = max(1, 512 * 256 // (tokens * width))
    clock = time.process_time if threads == 1 else time.perf_counter

    def once(run: Run) -> float:
        start = clock()
        for _ in range(inner):
            run(x, logits)
        return (clock() - start) / inner

    works = {kind: lambda turn, run=run: once(run) for kind, run in opened.items()}
    seconds = in_turns(works, runs)
    rows: dict[str, dict[str, Any]] = {
        kind: {
            "ms": round(1000 * statistics.median(taken), 4),
            "best_ms": round(1000 * min(taken), 4),
            "passes": not missed[kind],
            "misses": missed[kind],
        }
        for kind, taken in seconds.items()
    }
    # Of the shortest times: a busy machine stretches medians by what it likes.
    passing = {kind: row["best_ms"] for kind, row in rows.items() if row["passes"]}
    fastest = min(passing, key=lambda kind: passing[kind])
    return {
        "width": width,
        "tokens": tokens,
        "ways": rows,
        "fastest": fastest,
        "behind": round(rows[BODY]["best_ms"] / passing[fastest] - 1, 3),
    }


def main() -> None:
    """Parse, measure, print, write."""
    parser = options(__doc__, "cpu/bench_bodies.json")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--large", action="store_true", help=f"also (D, T) = {LARGE}")
    arguments = parser.parse_args()
    from export.graph.program import BODY
    from export.op.bodies import BODIES

    names = [*BODIES, MOE]
    print("    D     T " + "".join(f"{name:>19}" for name in names) + "   (ms, best of runs)")
    rows = []
    for width, tokens in (*SIZES, *(LARGE if arguments.large else ())):
        row = measure(width, tokens, arguments.runs, arguments.threads)
        rows.append(row)
        cells = [f"{r['best_ms']}{'' if r['passes'] else ' fails'}" for r in row["ways"].values()]
        print(f"{width:>5} {tokens:>5} " + "".join(f"{cell:>19}" for cell in cells), flush=True)
    answer = {
        "machine": machine(arguments.threads, "numpy", "onnx", "onnxruntime", "torch"),
        "clock": "process_time" if arguments.threads == 1 else "perf_counter",
        "experts": EXPERTS,
        "top_k": TOP_K,
        "runs": arguments.runs,
        "chosen": BODY,
        "most_behind": max(row["behind"] for row in rows),
        "sizes": rows,
    }
    write_figures(arguments.json, "scripts.bench.bodies", answer)
    print(f"{BODY} is chosen; at most {answer['most_behind']:.0%} behind the fastest that passes")


if __name__ == "__main__":
    main()
