"""HTML from function calls: text is escaped, markup is a type of its own."""

from collections.abc import Iterable
from html import escape
from typing import TypeAlias

_VOID = ("img", "meta", "br")


class Html(str):
    """Markup, that is not to be escaped again."""


Child: TypeAlias = "str | Html | int | float | Iterable[Child] | None"


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """An element. `class_` and `stroke_width` give `class` and `stroke-width`; None leaves one out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Children one after the other; None is nothing."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, str | int | float):
            parts.append(escape(str(child)))
        else:
            parts.append(str(join(*child)))
    return Html("".join(parts))


def table(
    head: Iterable[Child],
    rows: Iterable[Iterable[Child]],
    *,
    caption: Child = None,
    class_: str | None = None,
) -> Html:
    """A table; a cell that is not an element yet becomes one, the first of a row its header.

    The head of a column is aligned as the column's first cell is (`class="n..."`: numbers, to the right).
    """
    lines = [list(row) for row in rows]
    first = lines[0] if lines else []
    body = [
        tag("tr", [_cell("th" if i == 0 else "td", cell, "row") for i, cell in enumerate(row)])
        for row in lines
    ]
    return tag(
        "div",
        tag(
            "table",
            None if caption is None else tag("caption", caption),
            tag("thead", tag("tr", [_head(cell, first[i : i + 1]) for i, cell in enumerate(head)])),
            tag("tbody", body),
            class_=class_,
        ),
        class_="scroll",
    )


def _head(content: Child, below: Iterable[Child]) -> Html:
    is_number = any(isinstance(cell, Html) and cell.startswith('<td class="n') for cell in below)
    return tag("th", content, scope="col", class_="n" if is_number else None)


def _cell(name: str, content: Child, scope: str) -> Html:
    if isinstance(content, Html) and content.startswith(("<td", "<th")):
        return content
    return tag(name, content, scope=scope if name == "th" else None)
