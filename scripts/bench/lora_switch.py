"""Time to add LoRAs to weights of FLUX.1's size as they are bound (runtime.lora.placement).

    python -m scripts.bench.lora_switch [--rank 32] [--runs 3] [--json FILE]

One double and one single block of preset L, random bfloat16 weights, every Linear changed; each
tensor is widened, changed and rounded back, as a GPU backend has it uploaded. The model's time is
19 and 38 times theirs. Processor time on one thread: tensors are independent of each other.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from runtime.files.tensors import narrow, widen
from runtime.lora.changes import LowRank
from runtime.lora.placement import Adapted, Adapters, Part
from scripts.figures import machine, options, write_figures

WIDTH, EXPERTS, HIDDEN, SHARED = 3072, 12, 768, 3072
NEURONS = SHARED + EXPERTS * HIDDEN
BLOCKS = {"double": 19, "single": 38}


class Weights:
    """Tensors in memory as a bundle's file has them: bfloat16 bits."""

    def __init__(self) -> None:
        self.held: dict[str, np.ndarray] = {}

    def array(self, name: str, dtype: str) -> np.ndarray:
        """See runtime.files.tensors.SafeTensors."""
        return self.held[name] if dtype == "bfloat16" else widen(self.held[name])


class Model:
    """A block's tensors, where its Linears lie in them, and a change of each."""

    def __init__(self, rank: int) -> None:
        self.rank, self.random = rank, np.random.default_rng(0)
        self.weights = Weights()
        self.placed: list[tuple[str, Part, LowRank]] = []

    def tensor(self, name: str, *shape: int) -> None:
        """Random weights."""
        values = self.random.standard_normal(shape, np.float32)
        self.weights.held[name] = narrow(values)

    def linear(self, outputs: int, inputs: int) -> LowRank:
        """A change of a Linear."""
        up = self.random.standard_normal((outputs, self.rank), np.float32)
        return LowRank(up, self.random.standard_normal((self.rank, inputs), np.float32), 0.01)

    def plain(self, name: str, outputs: int, inputs: int, count: int = 1) -> None:
        """A tensor [inputs, count * outputs] of `count` Linears side by side."""
        self.tensor(name, inputs, count * outputs)
        for i in range(count):
            part = Part(name, "transposed", None, None, i * outputs, (i + 1) * outputs)
            self.placed.append((name, part, self.linear(outputs, inputs)))

    def ffn(self, name: str, *, second: bool = True) -> None:
        """A sparse FFN, its neurons in random order."""
        order = self.random.permutation(NEURONS)
        head, tail = order[:SHARED], order[SHARED:]
        self.tensor(f"{name}.fc1", WIDTH, SHARED)
        self.tensor(f"{name}.w1", EXPERTS, WIDTH, HIDDEN)
        self.tensor(f"{name}.fc2", SHARED, WIDTH)
        self.tensor(f"{name}.w2", EXPERTS, HIDDEN, WIDTH)
        up, down = self.linear(NEURONS, WIDTH), self.linear(WIDTH, NEURONS)
        for tensor, form, rows, columns, change, end in (
            ("fc1", "transposed", head, None, up, SHARED),
            ("w1", "up", tail, None, up, HIDDEN),
            ("fc2", "transposed", None, head, down, WIDTH),
            ("w2", "down", None, tail, down, WIDTH),
        ):
            part = Part(f"{name}.{tensor}", form, rows, columns, 0, end)
            self.placed.append((part.tensor, part, change))


def block(kind: str, rank: int) -> Model:
    """One block of FLUX.1 after conversion."""
    model = Model(rank)
    for stream in ("image", "text") if kind == "double" else ("",):
        model.plain(f"{stream}qkv", WIDTH, WIDTH, 3)
        model.plain(f"{stream}out", WIDTH, WIDTH)
        model.plain(f"{stream}modulation", (6 if kind == "double" else 3) * WIDTH, WIDTH)
        model.ffn(f"{stream}ffn")
    return model


def seconds(kind: str, rank: int) -> dict[str, Any]:
    """Processor and wall time of one block's tensors."""
    model = block(kind, rank)
    adapters = object.__new__(Adapters)
    adapters.by_tensor = {}
    for name, part, change in model.placed:
        adapters.by_tensor.setdefault(name, []).append((part, change.scaled(0.8)))
    adapted = Adapted(model.weights, adapters)  # type: ignore[arg-type]
    wall, cpu = time.perf_counter(), time.process_time()
    for name in model.weights.held:
        adapted.array(name, "bfloat16")
    return {
        "parameters": sum(each.size for each in model.weights.held.values()),
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
    }


def main() -> None:
    """Parse, measure, print, write."""
    parser = options(__doc__, "big/lora_switch.json")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    for kind in BLOCKS:
        found = [seconds(kind, arguments.rank) for _ in range(arguments.runs)]
        rows[kind] = {
            "blocks": BLOCKS[kind],
            "parameters": found[0]["parameters"],
            "cpu_s": round(statistics.median(row["cpu_s"] for row in found), 3),
            "wall_s": round(statistics.median(row["wall_s"] for row in found), 3),
        }
        print(kind, rows[kind], flush=True)
    total = sum(row["blocks"] * row["cpu_s"] for row in rows.values())
    print(f"the model: {total:.0f} s of one core")
    answer = {"rank": arguments.rank, "blocks": rows, "model_cpu_s": round(total, 1)}
    write_figures(
        arguments.json, "scripts.bench.lora_switch", {"machine": machine(1, "numpy"), **answer}
    )


if __name__ == "__main__":
    main()
