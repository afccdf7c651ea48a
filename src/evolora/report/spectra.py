"""The page of an inspection of redundancy: how much of its rank each layer uses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from evolora.evaluation.spectra import SIDES, Spectra, Spread, UpdateSpread, mean_spread
from evolora.report.parts import framed, page
from evolora.report.svg import Cell, HeatMap, scale

NAMES = {"A": "A: what it reads", "B": "B: what it writes", "update": "the update B A"}
STYLE = """
table.sortable th, table.sortable td { padding: 5px 6px; }
table.sortable th { white-space: normal; }
table.sortable td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
"""
"""Eleven columns on one screen; long names of layers leave room beside them on a phone."""
_BLOCK = re.compile(r"^(.*?)(?:^|\.)(\d+)\.(.*)$")


def write_spectra(found: Spectra, out: str | Path) -> Path:
    """Write the page (one self-contained HTML file) and return its path."""
    from evolora.storage.files import write_bytes

    sides = [side for side in SIDES if any(side in one.spreads for one in found.updates)]
    body = [
        f"<h1>Redundancy of {escape(found.source)}</h1>",
        "<h2>Share of its rank that an update uses</h2>",
        "<p>Effective rank over rank (%): 100 where all singular values are alike. Rows: kinds of "
        "layers; columns: blocks; means over a layer's experts, but for idle ones (B is zero).</p>",
        scale(),
        framed((NAMES[side], share_map(found, side)) for side in sides),
        "<h2>Likeness of ranks</h2>",
        "<p>Mean |cosine| of pairs of ranks (%): 0 where none repeats another.</p>",
        framed((NAMES[side], likeness_map(found, side)) for side in sides),
        "<h2>Numbers</h2>",
        _table(found),
    ]
    if found.left_out:
        body.append(f"<p>{escape(left_out_of(found))}.</p>")
    target = Path(out)
    write_bytes(target, page("Redundancy", body, STYLE).encode())
    return target


def share_map(found: Spectra, side: str) -> str:
    """Draw the effective rank of each layer's updates, as a share of their rank."""
    return _map(
        found,
        f"effective rank of {side} as a share of the rank",
        side,
        lambda own, spread: spread.effective_rank / own[0].rank,
    )


def likeness_map(found: Spectra, side: str) -> str:
    """Draw how alike the ranks of each layer's updates are."""
    return _map(
        found,
        f"mean absolute cosine of the ranks of {side}",
        side,
        lambda _, spread: spread.correlation,
    )


def place_of(layer: str, *, whole: bool = False) -> tuple[str, str]:
    """Return (kind of layer, block) of a layer's name; "-" for one that is in no block.

    Args:
        layer: its name.
        whole: the kind is all that stands behind the block, not the last word of it.
    """
    match = _BLOCK.match(layer)
    if match is None:
        return layer if whole else layer.rpartition(".")[2], "-"
    before, block, behind = match.groups()
    tower = next((word for word in ("vision", "text", "language") if word in before), "")
    return f"{tower} {behind if whole else behind.rpartition('.')[2]}".strip(), block


def places_of(layers: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return the places of layers; kinds of which a block has several have their whole names."""
    short = {layer: place_of(layer) for layer in layers}
    taken = Counter(short.values())
    several = {kind for (kind, _), count in taken.items() if count > 1}
    return {
        layer: place_of(layer, whole=True) if place[0] in several else place
        for layer, place in short.items()
    }


def _map(
    found: Spectra, label: str, side: str, value: Callable[[list[UpdateSpread], Spread], float]
) -> str:
    layers = found.by_layer()
    places = places_of(layers)
    rows = list(dict.fromkeys(kind for kind, _ in places.values()))
    columns = sorted(
        dict.fromkeys(block for _, block in places.values()),
        key=lambda block: (block == "-", int(block) if block != "-" else 0),
    )
    sums: dict[tuple[int, int], list[float]] = {}
    names: dict[tuple[int, int], list[str]] = {}
    for layer, own in layers.items():
        kind, block = places[layer]
        spread = mean_spread(own, side)
        if spread is None:
            continue
        key = (rows.index(kind), columns.index(block))
        sums.setdefault(key, []).append(value(own, spread))
        names.setdefault(key, []).append(layer)

    def cell(i: int, j: int) -> Cell:
        known = sums.get((i, j))
        return None if known is None else min(1.0, sum(known) / len(known))

    def hover(i: int, j: int) -> str:
        shown = cell(i, j)
        if shown is None:
            return f"{rows[i]}, block {columns[j]}: none"
        return f"{', '.join(names[i, j])}: {100 * shown:.1f} %"

    return HeatMap(
        rows=rows,
        columns=columns,
        cells=[[cell(i, j) for j in range(len(columns))] for i in range(len(rows))],
        label=label,
        hover=hover,
        upright=True,
        letters=32,  # names of one block differ at their ends
    ).draw()


def left_out_of(found: Spectra) -> str:
    """Return which layers the numbers do not speak of."""
    return f"Left out, for no factors that stand in pairs of ranks: {', '.join(found.left_out)}"


def columns_of(side: str) -> tuple[str, str, str]:
    """Return the titles of a side's columns in a table."""
    return (f"erank {side}", f"stable {side}", f"|cos| {side}")


def rows_of(found: Spectra) -> list[tuple[str, str, list[float | None]]]:
    """Return (layer, rank and experts, numbers of A, B and the update) of each layer."""
    rows = []
    for layer, own in found.by_layer().items():
        numbers: list[float | None] = []
        for side in SIDES:
            spread = mean_spread(own, side)
            numbers += (
                [None] * 3
                if spread is None
                else [spread.effective_rank, spread.stable_rank, spread.correlation]
            )
        size = str(own[0].rank) if len(own) == 1 else f"{own[0].rank} x {len(own)}"
        idle = sum(update.idle for update in own)
        size += f", {idle} idle" if idle else ""
        rows.append((layer, size, numbers))
    return rows


def text_of(value: float | None) -> str:
    """Return a number as tables show it."""
    return "-" if value is None else f"{value:.2f}"


def _table(found: Spectra) -> str:
    heads: Sequence[str] = ("layer", "rank", *(t for side in SIDES for t in columns_of(side)))
    head = "".join(f'<th><button type="button">{escape(title)}</button></th>' for title in heads)
    body = []
    for layer, size, numbers in rows_of(found):
        cells = "".join(
            f'<td data-value="{"" if value is None else value}">{text_of(value)}</td>'
            for value in numbers
        )
        name = escape(layer, quote=True)
        body.append(
            f'<tr><td data-value="{name}">{name.replace(".", ".<wbr>")}</td>'
            f'<td data-value="{int(size.split()[0].rstrip(","))}">{size}</td>{cells}</tr>'
        )
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
