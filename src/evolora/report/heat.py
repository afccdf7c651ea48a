"""Matrices of scores as colored tables: a fifth of the bytes of drawings, and read aloud."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from evolora.report.figures import Array
from evolora.report.svg import color, ink

_STEPS = 20  # colors beside the first; more cannot be told apart

STYLE = """
table.heat { width: auto; font-size: 10px; border-collapse: separate; border-spacing: 1px; }
.heat th, .heat td { border: 0; padding: 0; font-weight: 400; position: static; }
.heat td { min-width: 28px; height: 21px; text-align: center; }
.heat tbody th { text-align: right; padding-right: 5px; font-size: 11px; color: var(--soft); }
.heat thead th { font-size: 11px; color: var(--soft); }
.heat thead th span { writing-mode: vertical-rl; transform: rotate(180deg); padding: 0 0 3px; }
.heat td.own { outline: 2px solid var(--just); outline-offset: -2px; }
.heat td.no { outline: 1px dashed var(--none); outline-offset: -1px; }
""" + "".join(
    f".heat .c{i} {{ background: {color(i / _STEPS)}; "
    f"color: {'#fff' if ink(i / _STEPS) == 'on-dark' else '#111'}; }}\n"
    for i in range(_STEPS + 1)
)


def matrix_table(tasks: Sequence[str], values: Array, largest: Array, label: str) -> str:
    """Return a matrix as a table: rows after learning, columns tested on.

    Args:
        tasks: in learning order.
        values: (T + 1, T) scores, the row before any learning first; NaN is "not evaluated", and
            a first row of it is left out.
        largest: (T,) the best score that each task's metric gives, for the colors.
        label: what the table shows, for screen readers.
    """
    rows = list(zip(("(before)", *tasks), values.tolist(), strict=True))
    if all(number != number for number in rows[0][1]):
        rows = rows[1:]
    heads = "".join(f"<th><span>{escape(task)}</span></th>" for task in tasks)
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(
            _cell(number, number / best, own=tasks[j] == name)
            for j, (number, best) in enumerate(zip(row, largest.tolist(), strict=True))
        )
        + "</tr>"
        for name, row in rows
    )
    return (
        f'<table class="heat" aria-label="{escape(label, quote=True)}">'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cell(number: float, share: float, *, own: bool) -> str:
    if number != number:  # NaN
        return '<td class="no"></td>'
    step = round(_STEPS * min(max(share, 0.0), 1.0))
    text = f"{100 * number:.0f}" if number >= 0.9995 or number == 0 else f"{100 * number:.1f}"
    return f'<td class="c{step}{" own" if own else ""}">{text}</td>'
