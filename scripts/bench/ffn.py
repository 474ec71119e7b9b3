"""One FFN in ONNX Runtime on the CPU: sparse (1S12E2A) against the dense one it replaces.

    python -m scripts.bench.ffn [--runs 15] [--threads 1] [--large] [--json FILE]

Both graphs are traced by the exporter itself (export.graph.blocks.block_type), with the body that
bundles carry, weights as initializers. Sparse and dense take turns, so that a busy machine slows
both; the ratio is the median over pairs. Ideal: 8 D^2 multiplications a token densely, 3 D^2
sparsely (plus the router), 2.67x.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from scripts.figures import cpu_session, in_turns, machine, options, ratios, write_figures

EXPERTS, TOP_K = 12, 2
SIZES = ((1024, 512), (256, 512), (128, 32))  # (D, T)
LARGE = (1024, 4608)  # 512 text and 4096 image tokens: FLUX.1 at 1024 x 1024
TARGET = {"width": 1024, "tokens": 512, "speedup": 1.8}


def build(module: Any, width: int, top_k: int | None, threads: int) -> Any:
    """An ONNX Runtime session of x [batch, image_tokens, D] -> y, its weights random."""
    import numpy as np
    import onnx
    import torch

    from export.graph.blocks import block_type
    from export.graph.trace import Spec

    spec = Spec(torch.float32, ("batch", "image_tokens", width))
    row = block_type(
        "ffn",
        module,
        lambda run, tensors: run(tensors["x"]),
        {"x": spec},
        {"y": spec},
        torch.float32,
        [top_k] if top_k else (),
    )
    model = row.graphs[str(top_k) if top_k else ""]
    rng = np.random.default_rng(0)
    for name, weight in row.weights.items():
        shape = [int(side) for side in weight.shape]
        fan_in = 1 if len(shape) == 1 else shape[-2]
        values = rng.standard_normal(shape, np.float32) * np.float32(fan_in**-0.5)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    tokens = [value for value in model.graph.input if value.name == "x"]
    del model.graph.input[:]
    model.graph.input.extend(tokens)
    return cpu_session(model.SerializeToString(), threads)


def sessions(width: int, threads: int) -> dict[str, Any]:
    """The dense and the sparse FFN of one width."""
    import torch
    from diffusers.models.attention import FeedForward

    from d2m.model.sparse_ffn import SparseFFN
    from export.graph.prepare import FlatFFN

    with torch.device("meta"):
        dense = FeedForward(width, width, activation_fn="gelu-approximate").eval()
        sparse = FlatFFN(SparseFFN(width, width, EXPERTS, width // 4, TOP_K)).eval()
    return {
        "dense": build(dense, width, None, threads),
        "sparse": build(sparse, width, TOP_K, threads),
    }


def measure(width: int, tokens: int, runs: int, threads: int) -> dict[str, Any]:
    """Medians in milliseconds and the median ratio; dense and sparse in turn."""
    import numpy as np

    both = sessions(width, threads)
    x = np.random.default_rng(1).standard_normal((1, tokens, width), np.float32)
    inner = max(1, 512 * 256 // (tokens * width) * 4)  # small ones many times a reading

    def once(session: Any) -> float:
        start = time.perf_counter()
        for _ in range(inner):
            session.run(None, {"x": x})
        return (time.perf_counter() - start) / inner

    works = {name: lambda turn, session=session: once(session) for name, session in both.items()}
    seconds = in_turns(works, runs, warm_up=2)
    return {
        "width": width,
        "tokens": tokens,
        "dense_ms": round(1000 * statistics.median(seconds["dense"]), 4),
        "sparse_ms": round(1000 * statistics.median(seconds["sparse"]), 4),
        **ratios(seconds["dense"], seconds["sparse"]),
        "speedup_of_minima": round(min(seconds["dense"]) / min(seconds["sparse"]), 3),
    }


def main() -> None:
    """Parse, measure, print, write."""
    parser = options(__doc__, "cpu/bench_ffn.json")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--large", action="store_true", help=f"also (D, T) = {LARGE}")
    arguments = parser.parse_args()
    from export.graph.program import BODY

    rows = []
    print(f"{'D':>5} {'T':>5} {'dense ms':>10} {'sparse ms':>10} {'speedup':>8}  range")
    for width, tokens in (*SIZES, *([LARGE] if arguments.large else [])):
        row = measure(width, tokens, arguments.runs, arguments.threads)
        rows.append(row)
        low, high = row["speedup_range"]
        print(
            f"{width:>5} {tokens:>5} {row['dense_ms']:>10.3f} {row['sparse_ms']:>10.3f}"
            f" {row['speedup']:>7.2f}x  {low:.2f}-{high:.2f}",
            flush=True,
        )
    answer = {
        "machine": machine(arguments.threads, "numpy", "onnx", "onnxruntime", "torch"),
        "experts": EXPERTS,
        "top_k": TOP_K,
        "body": BODY,
        "runs": arguments.runs,
        "sizes": rows,
        "target": TARGET,
    }
    write_figures(arguments.json, "scripts.bench.ffn", answer)


if __name__ == "__main__":
    main()
