"""What the sections of a comparison's page share: names of methods with their marks, tables."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from evolora.report.comparison_file import ComparisonFile, Result
from evolora.report.tables import Column

TAGS = {
    "zero-shot": "the untouched model: it learns nothing",
    "blind": "nothing is looked at: what the words of a question alone can tell",
    "joint": "all tasks are learned at once, which no continual learner can do",
    "task told": "which task a test sample is of is told, which the others must find out",
    "reference": "the method that differences are taken from",
}
"""Marks of methods that must not be read like the others, and why."""

STYLE = """
.lead { font-size: 16px; }
nav.toc { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 18px; font-size: 14px; }
a { color: inherit; text-decoration-color: var(--none); text-underline-offset: 3px; }
svg.shapes { position: absolute; }
.tag { display: inline-block; border: 1px solid var(--none); border-radius: 9px; padding: 0 7px;
  font-size: 11px; line-height: 16px; color: var(--soft); margin-left: 6px;
  white-space: nowrap; }
.fit thead th { white-space: normal; }
.fit { font-size: 13px; } .fit th, .fit td { padding: 6px 8px; }
.fit .words { text-align: left; }
.fit td.reason { white-space: normal; min-width: 190px; overflow-wrap: anywhere; }
.number small { font-size: inherit; color: var(--soft); }
pre { background: var(--panel); padding: 10px 12px; overflow-x: auto; font-size: 13px; }
@media (max-width: 640px) {
  .fit th, .fit td { padding: 6px; }
  .fit td:first-child { white-space: normal; min-width: 92px; max-width: 130px; }
  .fit .tag { margin-left: 0; display: block; width: fit-content; }
  .number small { display: block; font-size: 11px; }
}
@media print {
  @page { margin: 12mm; }
  nav.toc { display: none; }
  .fit { font-size: 10px; line-height: 1.3; } .fit th, .fit td { padding: 2px 5px; }
  .fit td:first-child { white-space: normal; min-width: 130px; }
  .fit .tag { font-size: 9px; line-height: 11px; }
  .fit th.plot { width: 30% !important; min-width: 0; }
  .fit td.plot svg { height: 18px; margin: -3px 0 3px; }
  .keep { break-inside: avoid; }
  pre { white-space: pre-wrap; }
}
"""


def anchor(number: int) -> str:
    """Return the place of a stream's section on the page."""
    return f"stream-{number + 1}"


def tags_of(found: ComparisonFile, result: Result | None, method: str) -> list[str]:
    """Return the marks of a method, in general (no ``result``) or on one stream."""
    kind = found.type_of(method)
    tags = [
        tag
        for tag, applies in (
            ("zero-shot", kind == "zero-shot"),
            ("blind", "blind" in method.lower().replace("_", "-").split("-")),
            ("joint", kind.startswith("joint")),
            ("task told", _told(found, result, method)),
        )
        if applies
    ]
    return tags


def _told(found: ComparisonFile, result: Result | None, method: str) -> bool:
    if result is not None:
        return result.routing == "oracle"
    routings = {r.routing for s in found.streams for r in s.results if r.method == method}
    return routings == {"oracle"}


def named(
    found: ComparisonFile, method: str, result: Result | None = None, more: Iterable[str] = ()
) -> str:
    """Return the cell with a method's name and its marks."""
    tags = [*tags_of(found, result, method), *more]
    kind = found.type_of(method)
    title = f' title="{escape(kind, quote=True)}"' if kind != method else ""
    marks = "".join(
        f'<span class="tag" title="{escape(TAGS.get(tag, ""), quote=True)}">{escape(tag)}</span>'
        for tag in tags
    )
    return f'<td data-value="{escape(method, quote=True)}"{title}>{escape(method)}{marks}</td>'


def table(heads: str, rows: Iterable[str], *, style: str = "") -> str:
    """Return a table that its headings sort, in a frame that scrolls."""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    extra = f' style="{style}"' if style else ""
    return (
        f'<div class="scroll"><table class="sortable fit"{extra}><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def best_of(results: Iterable[Result], column: Column) -> float | None:
    """Return the best mean of a column; None if nothing is to be marked."""
    means = [value.mean for one in results if (value := one.value(column.key))]
    if column.better is None or len(means) < 2:
        return None
    return max(means) if column.better == "more" else min(means)
