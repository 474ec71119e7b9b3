"""A plan as a person reads it: a table by component, and one sentence of what it comes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2m.plan.count import FIELDS


def table(answer: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """(title, header, rows) of a plan, for `print_table`."""
    size = f"{answer['height']} x {answer['width']} pixels, {answer['text_tokens']} text tokens"
    known = answer["family"]  # of a directory, whose title is its path
    model = answer["model"] if answer["model"] == known else f"{answer['model']} ({known})"
    title = f"{model}, {_named(answer)}: {_depth(answer['blocks'])}, {size}"
    header = ["component", "parameters", "activated", "of dense", "FLOPs", "of dense"]
    rows = [
        _row(part.replace("ffn", "FFN").replace("adaln", "AdaLN").replace("_", " "), row)
        for part, row in answer["components"].items()
    ]
    sums = {key: sum(row[key] for row in answer["components"].values()) for key in FIELDS}
    return title, header, [*rows, _row("total", sums)]


def conclusion(answer: Mapping[str, Any]) -> str:
    """One sentence: what a step costs against the dense model, and what the weights take."""
    share = answer["activated_params"] / answer["dense"]["params"]
    sizes = {"fp32": answer["memory"]["fp32"], "16-bit": answer["memory"]["bf16"]}
    memory = " or ".join(f"{figure(bytes_)}B in {dtype}" for dtype, bytes_ in sizes.items())
    return (
        f"A step uses {answer['activated_params']:,} of {answer['total_params']:,} parameters "
        f"({share:.1%} of the dense model's) and {figure(answer['flops'])}FLOP "
        f"({answer['flops_vs_dense']:.1%}), {answer['ffn_activated_share']:.1%} of an FFN; the "
        f"weights take {memory}."
    )


def figure(number: int) -> str:
    """Four digits and a unit: 49.61 T, 4.77 M, 812."""
    for unit, name in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.4g} {name}"
    return f"{number} "


def _row(name: str, row: Mapping[str, int]) -> list[str]:
    def share(key: str, of: str) -> str:
        return f"{row[key] / row[of]:.1%}" if row[of] else "new"

    cells = [f"{row['params']:,}", f"{row['activated']:,}", share("activated", "dense_params")]
    return [name, *cells, figure(row["flops"]).strip(), share("flops", "dense_flops")]


def _named(answer: Mapping[str, Any]) -> str:
    if answer["recipe"] is None:
        return "dense"
    mode = answer["adaln"]["mode"]
    experts = f"{answer['top_k']} of {answer['num_experts']} experts"
    return f"recipe {answer['recipe']}, {experts}, {mode} AdaLN"


def _depth(blocks: Mapping[str, Mapping[str, int]]) -> str:
    """11D + 24S of 19D + 38S blocks."""
    active, dense = (
        " + ".join(f"{row[key]}{kind[0].upper()}" for kind, row in blocks.items())
        for key in ("active", "dense")
    )
    return f"{active} blocks" if active == dense else f"{active} of {dense} blocks"
