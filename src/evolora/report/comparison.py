"""The page of a comparison: which method is how good on which stream, and how sure that is.

One HTML file that loads nothing (see :mod:`evolora.report.page`). What it says first is what a
reader wants first: ranks and the main score of every method on every stream; then a section per
stream with all scores, the paired differences from the reference and the matrices; then what has no
result and why, and how to run it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from evolora.report import comparison_runs, comparison_stream, heat, strips
from evolora.report.comparison_file import ComparisonFile
from evolora.report.comparison_parts import STYLE, anchor, best_of, named, table
from evolora.report.files import checked
from evolora.report.parts import cell, heading, page
from evolora.report.tables import is_best


def write_comparison_page(comparison: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of a comparison and return its path.

    Args:
        comparison: what ``comparison.json`` holds.
        path: the HTML file; an existing one is replaced at once, never left half-written.

    Raises:
        StorageError: a field is missing or wrong, or the file cannot be written.
    """
    from evolora.storage.files import write_bytes  # it knows tensors: torch only when writing

    found = checked(comparison, ComparisonFile, "comparison.json")
    title = f"Comparison: {found.title}"
    body = [_header(title, found), *_overview(found)]
    for number, stream in enumerate(found.streams):
        body += comparison_stream.section(found, stream, number)
    body += comparison_runs.sections(found)
    target = Path(path)
    write_bytes(target, page(title, body, STYLE + strips.STYLE + heat.STYLE).encode())
    return target


def _header(title: str, found: ComparisonFile) -> str:
    protocol = found.protocol
    facts = {
        "Streams": ", ".join(stream.name for stream in found.streams),
        "Methods": str(len(found.methods)),
        "Seeds": ", ".join(map(str, protocol.seeds)),
        "Orders of tasks": ", ".join(protocol.orders),
        "Ranked by": found.main.title,
        "Differences from": (
            "the best method of each stream" if protocol.reference == "best" else protocol.reference
        ),
        "Versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "Date": found.started[:10],
        "Computing": _duration(found.seconds),
    }
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
        if value
    )
    links = [(anchor(i), stream.name) for i, stream in enumerate(found.streams)]
    links = [("overview", "Overview"), *links, *comparison_runs.links(found)]
    toc = "".join(f'<a href="#{place}">{escape(name)}</a>' for place, name in links)
    return (
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(_summary(found))}</p>'
        f'<dl class="facts">{cells}</dl></header><nav class="toc">{toc}</nav>'
    )


def _summary(found: ComparisonFile) -> str:
    """Return how much there is, in a sentence or two."""
    counts = {
        state: sum(one.state == state for one in found.cells)
        for state in ("finished", "failed", "waiting", "not applicable")
    }
    rest = ", ".join(
        f"{count} {state}" for state, count in counts.items() if count and state != "finished"
    )
    return (
        f"{_count(len(found.methods), 'method')} on {_count(len(found.streams), 'stream')}, "
        f"{_count(len(found.protocol.seeds), 'seed')}, "
        f"{_count(len(found.protocol.orders), 'order')} of tasks: "
        f"{counts['finished']} of {len(found.cells)} cells finished"
        f"{f', {rest}' if rest else ''}."
        + ("" if found.finished else " This comparison is not complete yet.")
    )


def _overview(found: ComparisonFile) -> list[str]:
    """Return the section with mean ranks and the main score of every method on every stream."""
    main, ranked = found.main, found.ranks.methods
    heading_ = '<h2 id="overview">Overview</h2>'
    if not ranked:
        return [heading_, "<p>No cell is finished yet, so nothing can be ranked.</p>"]
    streams = [stream for stream in found.streams if stream.results]
    last = max(place.of for one in ranked for place in one.streams.values())
    axis = strips.Axis(low=1, high=max(last, 2), ticks=_rank_ticks(max(last, 2)))
    best = {stream.name: best_of(stream.results, main) for stream in streams}
    rows = []
    for one in ranked:
        drawn = strips.dots(
            axis,
            one.mean,
            [
                (i, place.rank, f"{stream.name}: rank {place.rank:.3g} of {place.of}")
                for i, stream in enumerate(found.streams)
                if (place := one.streams.get(stream.name))
            ],
        )
        scores = ""
        for stream in streams:
            own = next((r for r in stream.results if r.method == one.method), None)
            value = own.value(main.key) if own else None
            scores += cell(value, main.unit, best=is_best(value, best[stream.name], main.unit))
        rows.append(
            f'{named(found, one.method)}<td data-value="{one.mean}">{one.mean:.2f}</td>'
            f'<td class="plot">{drawn}</td>{scores}'
        )
    heads = (
        '<th data-first="ascending"><button type="button">Method</button></th>'
        '<th data-first="ascending" aria-sort="ascending"><button type="button">Mean rank</button>'
        f"</th>{axis.head('Rank on each stream', lambda tick: f'{tick:.0f}')}"
        + "".join(heading(replace(main, title=stream.name)) for stream in streams)
    )
    return [
        heading_,
        f"<p>Methods by their mean rank over streams (1 is best; by {escape(main.title)}, seed by "
        "seed). Dots: the rank on each stream; bar: their mean. Then "
        f"{escape(main.title)} on each stream{_in(main.unit)}: mean ± {escape(_spread(found))}; "
        "the best of a stream in bold. A method that cannot run on a stream has no rank there. "
        "Click a heading to sort.</p>",
        strips.shapes(),
        strips.key(stream.name for stream in found.streams),
        table(heads, rows),
        comparison_runs.tag_notes(found),
    ]


def _rank_ticks(last: int) -> Sequence[float]:
    step = max(1, (last - 1 + 4) // 5)
    return [*range(1, last - step // 2, step), last]


def _spread(found: ComparisonFile) -> str:
    return found.protocol.spread or "standard deviation"


def _in(unit: str) -> str:
    return " in %" if unit == "percent" else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    """Return seconds as people say them: 48 s, 13 min, 2 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
