"""Pieces of HTML that the report's sections share."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from evolora.report import svg
from evolora.report.style import CSS, JS
from evolora.report.tables import Column, Comparison, Unit, Value, text_of


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """Return a self-contained HTML page with the report's style sheet, some more, and script."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or the browser asks a server for one
        f"<title>{escape(title)}</title>\n<style>{CSS}{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{JS}</script>\n</body></html>\n"
    )


def heading(column: Column) -> str:
    """Return a column's heading, a button that sorts the table by it."""
    first = "descending" if column.better == "more" else "ascending"
    return (
        f'<th data-first="{first}" title="{escape(column.about, quote=True)}">'
        f'<button type="button">{escape(column.title)}</button></th>'
    )


def cell(value: Value | None, unit: Unit, *, best: bool = False) -> str:
    """Return a table's cell; an empty one goes last when the table is sorted."""
    number = "" if value is None else str(value.mean)
    return (
        f'<td{" class=best" if best else ""} data-value="{number}">'
        f"{escape(text_of(value, unit))}</td>"
    )


def legend(comparison: Comparison) -> str:
    """Return which line is which method's."""
    items = "".join(
        f"<li>{svg.swatch(style % 8, strong=group.task_free)}{escape(group.label)}</li>"
        for style, group in enumerate(comparison.groups)
    )
    return f'<ul class="legend">{items}</ul>'


def framed(drawn: Iterable[tuple[str, str]], *, narrow: bool = False) -> str:
    """Return drawings, each under its name; a wide one scrolls in its frame."""
    boxes = "".join(
        f'<figure><h3>{escape(name)}</h3><div class="scroll">{drawing}</div></figure>'
        for name, drawing in drawn
    )
    return f'<div class="grid-of{" narrow" if narrow else ""}">{boxes}</div>'
