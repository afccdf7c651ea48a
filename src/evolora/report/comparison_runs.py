"""The end of a comparison's page: what has no result and why, how to run it again, every cell."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from html import escape

from evolora.evaluation.metrics import DEFINITIONS
from evolora.report.comparison_file import Cell, ComparisonFile
from evolora.report.comparison_parts import TAGS, table, tags_of
from evolora.report.parts import cell
from evolora.report.tables import Value


def links(found: ComparisonFile) -> list[tuple[str, str]]:
    """Return (place, name) of the sections."""
    without = [("without", "Without a result")] if _missing(found) else []
    return [*without, ("repeat", "How to repeat it")]


def sections(found: ComparisonFile) -> list[str]:
    """Return the sections."""
    return [*_without(found), *_repeat(found), _definitions(found), _cells(found)]


def tag_notes(found: ComparisonFile) -> str:
    """Return what the marks of methods say, of those that occur."""
    used = {tag for one in found.methods for tag in tags_of(found, None, one.name)}
    used |= {"blind"} if any(stream.majority for stream in found.streams) else set()
    items = "; ".join(f"{tag}: {about}" for tag, about in TAGS.items() if tag in used)
    return f'<p class="note">{escape(items[:1].upper() + items[1:])}.</p>' if items else ""


def _missing(found: ComparisonFile) -> list[Cell]:
    return [one for one in found.cells if one.state != "finished"]


def _without(found: ComparisonFile) -> list[str]:
    """Return the section on cells without a result, seeds of one reason on one line."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    reasons = {(s.name, one.method): one.reason for s in found.streams for one in s.methods}
    for one in _missing(found):
        reason = one.error or reasons.get((one.stream, one.method)) or ""
        if not reason and one.state == "waiting":
            reason = "not run yet"
        groups.setdefault((one.stream, one.method, one.state, reason), []).append(one)
    if not groups:
        return []
    rows = []
    for (stream, method, state, reason), cells in groups.items():
        logs = [f" Log: {one.log}" for one in cells[:1] if one.log]
        rows.append(
            _words((method, stream, state, _which(found, cells)))
            + f'<td class="words reason" data-value="{escape(reason, quote=True)}">'
            f"{escape(reason + ''.join(logs))}</td>"
        )
    return [
        '<h2 id="without">Cells without a result</h2>',
        "<p>Not applicable: the method cannot run on the stream, and is not ranked there. Failed: "
        "it ran and ended with an error. Waiting: not run yet.</p>",
        table(_heads(("Method", "Stream", "State", "Cells", "Reason"), "words"), rows),
    ]


def _which(found: ComparisonFile, cells: list[Cell]) -> str:
    """Return which cells those are: "all", or their seeds (and orders, where there are some)."""
    protocol = found.protocol
    if len(cells) == len(protocol.seeds) * len(protocol.orders):
        return "all"
    several = len(protocol.orders) > 1
    return ", ".join(
        f"{one.order}, seed {one.seed}" if several else f"seed {one.seed}" for one in cells
    )


def _repeat(found: ComparisonFile) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return [
        '<h2 id="repeat">How to repeat it</h2>',
        f"<p>With {escape(versions or 'the same versions')}:</p>",
        f"<pre><code>{escape(found.command or _command(found))}</code></pre>",
        "<p>Cells that are finished with the same settings, by their hash, are kept and not run "
        "again; each cell's folder holds its whole configuration, the learned parts, its scores "
        "and its log.</p>",
    ]


def _command(found: ComparisonFile) -> str:
    seeds = found.protocol.seeds
    counted = f" --seeds {len(seeds)}" if seeds == tuple(range(len(seeds))) else ""
    return f"evolora compare {shlex.quote(found.title + '.yaml')}{counted}"


def _definitions(found: ComparisonFile) -> str:
    items = "".join(
        f"<dt>{escape(metric.title)}{_key(key, metric.title)}</dt>"
        f"<dd>{escape(DEFINITIONS.get(key) or metric.about)}</dd>"
        for key, metric in found.metrics.items()
    )
    level = f"{100 * found.protocol.interval.level:g}"
    return (
        "<details><summary>What the numbers are</summary>"
        f"<p>± is the {escape(found.protocol.spread or 'standard deviation')}. Differences are "
        "paired: taken cell by cell between two methods with the same order and seed, then "
        f"averaged; intervals are {level} % intervals of that mean "
        f"({escape(found.protocol.interval.kind)} distribution), wide where cells are few. Many "
        "intervals are shown, each at that level by itself: of twenty without any true difference "
        "about one would leave out zero.</p>"
        f"<dl>{items}</dl></details>"
    )


def _key(key: str, title: str) -> str:
    """Return the key of a metric in ``comparison.json``, where its title does not tell it."""
    return "" if title.lower() == key.replace("_", " ") else f" <code>{escape(key)}</code>"


def _cells(found: ComparisonFile) -> str:
    main = found.main
    rows = []
    for one in found.cells:
        words = (one.method, one.stream, one.order, str(one.seed), one.config_hash, one.state)
        score, seconds = one.metrics.get(main.key), one.seconds
        rows.append(
            _words(words)
            + cell(None if score is None else Value(mean=score), main.unit)
            + cell(None if seconds is None else Value(mean=seconds), "seconds")
        )
    heads = _heads(("Method", "Stream", "Order", "Seed", "Config", "State"), "words")
    heads += _heads((main.title, "Seconds"))
    return f"<details><summary>Every cell ({len(rows)})</summary>{table(heads, rows)}</details>"


def _heads(names: Iterable[str], kind: str = "") -> str:
    return "".join(
        f'<th class="{kind}" data-first="ascending">'
        f'<button type="button">{escape(name)}</button></th>'
        for name in names
    )


def _words(words: Iterable[str]) -> str:
    return "".join(
        f'<td class="words" data-value="{escape(word, quote=True)}">{escape(word)}</td>'
        for word in words
    )
