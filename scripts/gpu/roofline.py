"""The figures of scripts.gpu as Markdown tables and a roofline plot.

    python -m scripts.gpu.roofline results/h200/bench_gpu.json

Writes bench_gpu.md and roofline.svg beside the JSON. The roof is what the same run measured: bytes
a second of a copy, operations a second of a large product.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from runtime.files.atomic import write_text

# What the issue asks for, by name: (value is measured so, target).
TARGETS = {
    "routed part, TFLOP/s": 450.0,
    "routed part against the equal-FLOPs dense FFN": 0.85,
    "FFN against dense": 2.0,
    "step L": 1.33,
    "step S": 2.1,
    "step XS": 2.7,
}


def ratio(cells: dict[str, Any], slow: str, fast: str) -> float | None:
    """Milliseconds of one cell over another's; None where one is missing."""
    if "ms" not in cells.get(slow, {}) or "ms" not in cells.get(fast, {}):
        return None
    return float(cells[slow]["ms"] / cells[fast]["ms"])


def goals(cells: dict[str, Any]) -> dict[str, float | None]:
    """The figures that TARGETS names, at B = 1 with uniform routing."""
    layer = "layer/B1/uniform"
    routed = cells.get(f"{layer}/routed/triton", {}).get("tflops")
    equal = cells.get(f"{layer}/forward/dense equal", {}).get("tflops")
    best = min(
        ("triton", "triton compiled"),
        key=lambda name: cells.get(f"{layer}/forward/{name}", {}).get("ms", math.inf),
    )
    found: dict[str, float | None] = {
        "routed part, TFLOP/s": routed,
        "routed part against the equal-FLOPs dense FFN": routed / equal
        if routed and equal
        else None,
        "FFN against dense": ratio(cells, f"{layer}/forward/dense", f"{layer}/forward/{best}"),
    }
    for preset in ("L", "S", "XS"):
        found[f"step {preset}"] = ratio(cells, "step/dense compiled", f"step/{preset} compiled")
    return found


def tables(answer: dict[str, Any]) -> str:
    """Everything measured, as Markdown; what is missing is said to be."""
    cells, machine = answer["cells"], answer["machine"]
    lines = [
        f"# {machine['device']}, {answer['date']}",
        "",
        f"torch {machine['torch']}, triton {machine['triton']}, python {machine['python']};"
        f" `{answer['command']}`.",
        "",
        "| target (B = 1) | wanted | measured |",
        "|---|---|---|",
    ]
    toy = answer["setting"].get("toy", False)
    if toy:
        lines.insert(2, "Toy sizes on a CPU: every cell exercised, nothing measured of a GPU.\n")
    for name, value in goals(cells).items():
        shown = "not measured" if toy or value is None else f"{value:.2f}"
        lines.append(f"| {name} | {TARGETS[name]:g} | {shown} |")
    checks = {n: r for n, r in cells.items() if n.startswith("correctness/") and "ok" in r}
    right = sum(row["ok"] for row in checks.values())
    lines += ["", f"Correct against float64: {right} of {len(checks)} cases.", ""]
    lines += ["| cell | ms | TFLOP/s | peak GiB | note |", "|---|---|---|---|---|"]
    for name, row in sorted(cells.items()):
        if name.startswith("correctness/"):
            continue
        note = row.get("skipped") or row.get("failed") or ""
        if row.get("psnr_to_ort"):
            note = f"{row['psnr_to_ort']} dB against ONNX Runtime"
        memory = f"{row['peak_bytes'] / 2**30:.2f}" if row.get("peak_bytes") else ""
        ms = row.get("ms", 1000 * row["seconds"] if "seconds" in row else "")
        lines.append(f"| {name} | {ms} | {row.get('tflops', '')} | {memory} | {note} |")
    return "\n".join(lines) + "\n"


def points(answer: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(contender, operations a byte, TFLOP/s) of the forward layer cells; least bytes moved."""
    setting, found = answer["setting"], []
    width, experts, k = setting["width"], setting["experts"], setting["top_k"]
    size = 4 if setting["dtype"] == "float32" else 2
    for name, row in answer["cells"].items():
        parts = name.split("/")
        if parts[0] != "layer" or parts[2:4] != ["uniform", "forward"] or "tflops" not in row:
            continue
        tokens = int(parts[1][1:]) * (setting["image_tokens"] + setting["text_tokens"])
        whole, used = 4 * width, width + k * (3 * width // experts)
        hidden = {"dense": whole, "dense equal": used}.get(parts[4], whole)  # weights read
        moved = size * (2 * tokens * width + 2 * width * hidden)
        done = 4 * tokens * width * (whole if parts[4] == "dense" else used)
        found.append((f"{parts[4]}, {parts[1]}", done / moved, row["tflops"]))
    return found


def roofline(answer: dict[str, Any]) -> str:
    """An SVG of both roofs and the layer's contenders, both axes logarithmic."""
    from matplotlib.figure import Figure

    from d2m.report.charts import alone, colour, svg, themed

    cells = answer["cells"]
    top = cells.get("ceilings/matmul", {}).get("tflops")
    wide = cells.get("ceilings/copy", {}).get("gb_s")
    dots = points(answer)
    if not (top and wide and dots):
        raise ValueError(
            "the file has no ceilings or no layer cells, expected both; run python -m scripts.gpu"
            " --sections ceilings,layer first."
        )
    knee = 1000 * top / wide
    xs, ys = [x for _, x, _ in dots] + [knee], [y for _, _, y in dots] + [top]
    first, last, low = min(xs) / 2, max(xs) * 3, min(ys) / 2
    first = max(first, low * knee / top)  # below it the roof is under the axis
    with themed():
        figure = Figure(figsize=(800 / 72, 400 / 72))
        axes = figure.subplots()
        roof = {"color": "black", "linewidth": 1.5}
        axes.loglog([first, knee, last], [first * top / knee, top, top], **roof)
        axes.set_title(f"{top:g} TFLOP/s, {wide:g} GB/s (measured)")
        axes.set(xlabel="operations per byte (least bytes)", ylabel="TFLOP/s")
        axes.set(xlim=(min(xs) / 2, last), ylim=(low, top * 2))
        for index, (name, x, y) in enumerate(sorted(dots)):
            look = {"linestyle": "none", "markersize": 8, "clip_on": False}
            look |= {"color": colour(f"c{index % 5}"), "marker": "os^DvP*X"[index // 5 % 8]}
            axes.plot(x, y, label=f"{name}: {y:g}", **look)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        figure.legend(loc="outside right upper")
        return alone(svg(figure, f"Roofline of {answer['machine']['device']}"))


def main() -> int:
    """Read, write two files, print the tables."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        given = sys.argv[1] if len(sys.argv) > 1 else "missing"
        print(
            f"error: the JSON file is {given}, expected one that python -m scripts.gpu wrote.",
            file=sys.stderr,
        )
        return 2
    path = Path(sys.argv[1])
    answer = json.loads(path.read_text(encoding="utf-8"))
    text = tables(answer)
    print(text)
    write_text(path.with_suffix(".md"), text)
    try:
        write_text(path.with_name("roofline.svg"), roofline(answer))
    except ImportError as error:  # a machine that only measures: the plot is made on another
        print(f"no plot: {error}; pip install matplotlib jinja2, then again", file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
