"""A picture of a ComfyUI workflow: its nodes, their links and values, as SVG.

python -m scripts.comfyui_picture docs/comfyui/workflow.json    # workflow.svg beside it
"""

from __future__ import annotations

import ast
import json
import sys
from html import escape
from pathlib import Path
from typing import Any

from runtime.files.atomic import write_bytes

ROOT = Path(__file__).resolve().parents[1]
TITLE, ROW, MARGIN = 30, 20, 20  # pixels
# ComfyUI's colours of what a link carries.
COLOURS = {"D2M_MODEL": "#b39ddb", "IMAGE": "#64b5f6", "MASK": "#81c784"}
BYPASSED = 4  # a node's mode: it is there and does nothing


def picture(workflow: dict[str, Any], titles: dict[str, str]) -> str:
    """The SVG; `titles`: what a type of node is called."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    width = max(node["pos"][0] + node["size"][0] for node in nodes.values()) + 2 * MARGIN
    height = max(node["pos"][1] + node["size"][1] for node in nodes.values()) + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#202020"/>',
    ]
    # Links first: nodes lie over them, as in ComfyUI.
    for _, start, out, end, into, kind in workflow["links"]:
        (x1, y1), (x2, y2) = slot(nodes[start], "outputs", out), slot(nodes[end], "inputs", into)
        bend = max(40, abs(x2 - x1) // 2)
        path = f"M{x1},{y1} C{x1 + bend},{y1} {x2 - bend},{y2} {x2},{y2}"
        lines.append(f'<path d="{path}" fill="none" stroke="{COLOURS[kind]}" stroke-width="2"/>')
    for node in nodes.values():
        lines += box(node, titles.get(node["type"], node["type"]))
    return "\n".join([*lines, "</svg>", ""])


def box(node: dict[str, Any], title: str) -> list[str]:
    """A node: its title, its slots and the values of its widgets."""
    (x, y), (width, height) = node["pos"], node["size"]
    off = node["mode"] == BYPASSED
    lines = [
        f'<g opacity="{0.5 if off else 1}">',
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="#353535"'
        ' stroke="#111"/>',
        text(x + 12, y + 20, title + (" (off)" if off else ""), "#eee", size=14),
    ]
    for side, anchor, inset in (("inputs", "start", 14), ("outputs", "end", -14)):
        for index, row in enumerate(linked(node, side)):
            cx, cy = slot(node, side, index)
            lines.append(f'<circle cx="{cx}" cy="{cy}" r="5" fill="{COLOURS[row["type"]]}"/>')
            lines.append(text(cx + inset, cy + 4, row["name"], "#ccc", anchor))
    slots = max(len(linked(node, side)) for side in ("inputs", "outputs"))
    y += TITLE + ROW * slots + 6
    for index, (name, value) in enumerate(widgets(node)):
        lines.append(text(x + 14, y + ROW * index + 14, name, "#888"))
        lines.append(text(x + width - 14, y + ROW * index + 14, value, "#cec", "end"))
    return [*lines, "</g>"]


def linked(node: dict[str, Any], side: str) -> list[dict[str, Any]]:
    """Inputs or outputs that links go to: not those that are widgets."""
    return [row for row in node[side] if "widget" not in row]


def widgets(node: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values; a seed's is followed by what ComfyUI does with it after a run."""
    names = []
    for row in node["inputs"]:
        if "widget" in row:
            names += [row["name"], "after a run"] if row["name"] == "seed" else [row["name"]]
    return [(name, str(value)) for name, value in zip(names, node["widgets_values"], strict=True)]


def slot(node: dict[str, Any], side: str, index: int) -> tuple[int, int]:
    """Where an input or output is."""
    x = node["pos"][0] + (node["size"][0] if side == "outputs" else 0)
    return x, node["pos"][1] + TITLE + ROW * index + ROW // 2


def text(x: int, y: int, words: str, fill: str, anchor: str = "start", size: int = 12) -> str:
    """One line of it."""
    return (
        f'<text x="{x}" y="{y}" fill="{fill}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(words)}</text>"
    )


def titles_of_nodes() -> dict[str, str]:
    """The pack's NODE_DISPLAY_NAME_MAPPINGS, read without ComfyUI."""
    for statement in ast.parse((ROOT / "comfyui" / "nodes.py").read_text("utf-8")).body:
        if "NODE_DISPLAY_NAME_MAPPINGS" in ast.unparse(statement)[:40]:
            assert isinstance(statement, ast.Assign)
            titles: dict[str, str] = ast.literal_eval(statement.value)
            return titles
    raise ValueError("comfyui/nodes.py names no nodes, expected NODE_DISPLAY_NAME_MAPPINGS.")


def main(path: str) -> None:
    """Write the picture beside the workflow."""
    workflow = json.loads(Path(path).read_text("utf-8"))
    out = Path(path).with_suffix(".svg")
    write_bytes(out, picture(workflow, titles_of_nodes()).encode())
    print(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
