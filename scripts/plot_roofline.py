"""The figures of scripts/bench_gpu.py as Markdown tables and a roofline drawing.

    python scripts/plot_roofline.py results/h200/bench_gpu.json

Writes bench_gpu.md and roofline.svg beside the JSON. The roof is what the same run measured: bytes
a second of a copy, operations a second of a large product.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

# What the issue asks for, by name: (value is measured so, target).
TARGETS = {
    "routed part, TFLOP/s": 450.0,
    "routed part against the equal-FLOPs dense FFN": 0.85,
    "FFN against dense": 2.0,
    "step L": 1.33,
    "step S": 2.1,
    "step XS": 2.7,
}
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 400, 70, 50, 20, 190
COLOURS = ("#1f5fa8", "#b4502d", "#3c8c50", "#7a4fa3", "#8a6d1c", "#a03060", "#3a7d8c", "#555555")


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


def decades(values: list[float]) -> tuple[float, float]:
    """Powers of ten around positive numbers."""
    low, high = math.log10(min(values)), math.log10(max(values))
    return 10.0 ** math.floor(low), 10.0 ** math.ceil(high + 0.1)


def roofline(answer: dict[str, Any]) -> str:
    """An SVG of both roofs and the layer's contenders, both axes logarithmic."""
    cells = answer["cells"]
    top = cells.get("ceilings/matmul", {}).get("tflops")
    wide = cells.get("ceilings/copy", {}).get("gb_s")
    dots = points(answer)
    if not (top and wide and dots):
        raise ValueError(
            "the file has no ceilings or no layer cells, expected both; run scripts/bench_gpu.py"
            " --sections ceilings,layer first."
        )
    xs = [x for _, x, _ in dots] + [1000 * top / wide]
    ys = [y for _, _, y in dots] + [top]
    x_low, x_high = (
        10 ** math.floor(math.log10(min(xs))),
        10 ** math.ceil(math.log10(max(xs)) + 0.1),
    )
    y_low, y_high = (
        10 ** math.floor(math.log10(min(ys))),
        10 ** math.ceil(math.log10(max(ys)) + 0.1),
    )

    def x_at(x: float) -> float:
        return LEFT + math.log(x / x_low) / math.log(x_high / x_low) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        share = math.log(max(y, y_low) / y_low) / math.log(y_high / y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, words: str, anchor: str = "start") -> str:
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        ' font-family="sans-serif" font-size="11" fill="#222">',
        f"<title>Roofline of {answer['machine']['device']}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for exponent in range(round(math.log10(x_low)), round(math.log10(x_high)) + 1):
        parts.append(
            text(x_at(10**exponent), HEIGHT - BOTTOM + 16, f"{10.0**exponent:g}", "middle")
        )
    for exponent in range(round(math.log10(y_low)), round(math.log10(y_high)) + 1):
        at = y_at(10.0**exponent)
        parts.append(
            f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
            + text(LEFT - 6, at + 4, f"{10.0**exponent:g}", "end")
        )
    knee = 1000 * top / wide
    first = max(x_low, y_low * 1000 / wide)
    roof = [(first, first * wide / 1000), (knee, top), (x_high, top)]
    path = "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in roof)
    parts.append(f'<path d="M{path}" fill="none" stroke="#222" stroke-width="1.5"/>')
    parts.append(text(LEFT + 6, y_at(top) - 6, f"{top:g} TFLOP/s, {wide:g} GB/s (measured)"))
    for index, (name, x, y) in enumerate(sorted(dots)):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="4" fill="{colour}"/>')
        row = TOP + 8 + 14 * index
        parts.append(f'<circle cx="{WIDTH - RIGHT + 14}" cy="{row - 4}" r="4" fill="{colour}"/>')
        parts.append(text(WIDTH - RIGHT + 24, row, f"{name}: {y:g}"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(text(middle, HEIGHT - 12, "operations per byte (least bytes)", "middle"))
    parts.append(text(LEFT, TOP - 6, "TFLOP/s"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def write(path: Path, words: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(words, encoding="utf-8")
    os.replace(temporary, path)


def main() -> int:
    """Read, write two files, print the tables."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        given = sys.argv[1] if len(sys.argv) > 1 else "missing"
        print(
            f"error: the JSON file is {given}, expected one that bench_gpu.py wrote.",
            file=sys.stderr,
        )
        return 2
    path = Path(sys.argv[1])
    answer = json.loads(path.read_text(encoding="utf-8"))
    words = tables(answer)
    print(words)
    write(path.with_suffix(".md"), words)
    try:
        write(path.with_name("roofline.svg"), roofline(answer))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
