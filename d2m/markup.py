"""HTML and SVG elements from Python, escaped by construction: text is text unless it is `Html`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path


class Html(str):
    """A string that is markup already, made by `el` or `join` from escaped parts."""


VOID = ("meta", "img", "br", "col")  # elements without a closing tag
Child = str | int | float | None


def el(tag: str, *children: Child, **attributes: Child) -> Html:
    """`<tag attributes>children</tag>`.

    Children that are not Html are escaped; None is left out. Attribute names: `class_` for
    `class`, `_` for `-` elsewhere; None is left out, floats are cut to two decimals.
    """
    words = [tag]
    for name, value in attributes.items():
        if value is not None:
            name = name.rstrip("_").replace("_", "-")
            words.append(f'{name}="{escape(text(value))}"')
    start = Html(f"<{' '.join(words)}>")
    return start if tag in VOID else Html(start + join(*children) + f"</{tag}>")


def join(*children: Child, between: str = "") -> Html:
    """Children one after the other; None is left out."""
    parts = [
        child if isinstance(child, Html) else escape(text(child), quote=False)
        for child in children
        if child is not None
    ]
    return Html(escape(between).join(parts))


def document(title: str, *body: Child) -> str:
    """A whole page: its style inside it, light and dark, nothing to load and nothing to run."""
    style = (Path(__file__).parent / "report.css").read_text("utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(style)),
    )
    return f"<!doctype html>\n{el('html', head, el('body', el('main', *body)), lang='en')}\n"


def section(title: str, note: str, *parts: Child) -> Html:
    """A headed part of a page."""
    return el("section", el("h2", title), el("p", note, class_="note"), *parts)


def figure(title: str, *parts: Child) -> Html:
    """A captioned chart."""
    return el("figure", el("figcaption", title), *parts, class_="chart")


def table(head: Sequence[Child], rows: Sequence[Sequence[Child]], words: int = 1) -> Html:
    """A table whose first columns, `words` of them, are words and whose others are figures."""
    kinds = ["words" if 0 < i < words else None for i in range(len(head))]
    columns = el("tr", *(el("th", cell, class_=kind) for cell, kind in zip(head, kinds)))
    body = (
        el(
            "tr",
            el("th", row[0], scope="row"),
            *(el("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:])),
        )
        for row in rows
    )
    inside = el("table", el("thead", columns), el("tbody", *body))
    return el("div", inside, class_="scroll")


def percent(share: float, digits: int = 0) -> str:
    """.287 as `29 %`."""
    return f"{100 * share:.{digits}f} %"


def text(value: Child) -> str:
    """A number as short as two decimals allow, everything else as it is."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
