"""docs/performance.md: results against the goals, with charts and the machine they were taken on.

The numbers live in a JSON file beside the page. A bench that is run again replaces its own part,
so that a long series can be measured piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evolora.bench import BENCHES
from evolora.bench.goals import judge
from evolora.bench.results import Result, Table, Value
from evolora.errors import ConfigError
from evolora.report.style import LINES
from evolora.report.svg import Line, LineChart
from evolora.storage.files import read_json, write_bytes, write_json

CHART = (520, 230)

_HEAD = """# Performance

What experts cost on a frozen tower, measured by `evolora bench`; this page is written by
`evolora bench all --write docs/performance.md`. `make bench-quick` checks the ratios in two
minutes.

How it is measured: all variants of a table run in one process, interleaved in shuffled rounds. A
ratio is the median over rounds of a variant's time over its base's in the same round; "fastest" is
the ratio of the two fastest times. On the CPU torch has one thread and time is the process's CPU
time. The floor is the least that training at the same sites can cost: the frozen tower's forward,
and the activation gradient back to the outputs of the lowest adapted Linears. "Saved" is what one
forward keeps for backward, without parameters, each storage counted once. "Peak" is by how much a
step raises the resident memory, with blocks of a MiB and more mapped one by one: what a heap has
freed and cannot use again depends on what ran before, and would come on top.
"Error" is the largest difference from a float64 loop, relative to the largest value; whatever
differs by more than rounding can explain is not timed.

Differences below 5 % are ties.
"""


def write_page(results: Sequence[Result], path: Path) -> Path:
    """Write the page, its JSON and its charts; return the page's path.

    Raises:
        ConfigError: the file's name does not end in ".md".
    """
    if path.suffix != ".md":
        raise ConfigError(f"--write takes a Markdown file (.md); got {str(path)!r}")
    record = path.with_suffix(".json")
    known = _read(record) if record.exists() else {}
    known.update({result.bench: result for result in results if result.tables})
    ordered = [known[name] for name in BENCHES if name in known]
    values = [result.to_json() for result in ordered]
    write_json(record, {"format_version": 1, "results": values})
    parts = [_HEAD, _goals(ordered)]
    parts += [_section(result, path.parent) for result in ordered]
    write_bytes(path, "\n".join(parts).encode())
    return path


def _read(record: Path) -> dict[str, Result]:
    values = read_json(record, kind="bench record")["results"]
    return {value["bench"]: Result.from_json(value) for value in values}


def _goals(results: Sequence[Result]) -> str:
    measured = {key: value for result in results for key, value in result.measured.items()}
    lines = ["## Goals", "", "| number | usual | goal | measured | |", "|---|---|---:|---:|---|"]
    for verdict in judge(measured):
        goal = verdict.goal
        lines.append(
            f"| {goal.what} | {goal.usual} | {goal.bound} | {verdict.value:.3g} | {verdict.word} |"
        )
    return "\n".join([*lines, ""])


def _section(result: Result, folder: Path) -> str:
    what = BENCHES[result.bench]
    lines = [f"## {result.bench}", "", f"{what[0].upper()}{what[1:]}.", "", _machine(result), ""]
    for number, table in enumerate(table for table in result.tables if table.cells):
        lines += [f"### {table.title}", ""]
        if table.axis and len(table.columns) > 2:
            name = f"images/bench-{result.bench}-{number}.svg"
            write_bytes(folder / name, chart(table).encode())
            lines += [f"![{table.title}]({name})", ""]
        lines += [_markdown(table), ""]
        if table.note:
            lines += [table.note, ""]
    return "\n".join(lines)


def _machine(result: Result) -> str:
    facts: Mapping[str, Any] = result.environment
    packages = ", ".join(f"{k} {v}" for k, v in facts["packages"].items() if v)
    gemm = ", ".join(f"{rate} at n = {n}" for n, rate in facts["gemm_gflops"].items())
    what = facts.get("gpu") or f"{facts['processor']} ({', '.join(facts['cpu_flags'])})"
    state = "" if result.complete else " The run was interrupted."
    return (
        f"{facts['date']}; {what}, {facts['torch_threads']} of {facts['cores']} cores, "
        f"{facts['clock']}, {facts['dtype']}; load {facts['load_average']}; {packages}. "
        f"Calibration: 1576 × 768 times 768 × n GEMM, GFLOP/s: {gemm}; "
        f"copy {facts['copy_gb_per_s']} GB/s. Took {result.seconds:.0f} s.{state}"
    )


def _markdown(table: Table) -> str:
    headings = [f"{table.axis} = {c}" if table.axis else c for c in table.columns]
    lines = ["| | " + " | ".join(headings) + " |", "|---" + "|---:" * len(headings) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in table.texts()]
    return "\n".join(lines)


def chart(table: Table) -> str:
    """Return a table's rows as lines over its columns: an SVG that needs no page around it."""
    lines = [
        Line(label=row, style=i % len(LINES), values=[_number(cells.get(c)) for c in table.columns])
        for i, (row, cells) in enumerate(table.cells.items())
    ]
    highest = max((v for line in lines for v in line.values if v is not None), default=1.0)
    drawing = LineChart(
        lines=lines,
        ticks=[f"{table.axis} {column}" for column in table.columns],
        label=table.title,
        top=2.0 * math.ceil(highest / 2.0),
        unit=lambda value: f"{value:g}",
        size=CHART,
    ).draw()
    width, height = CHART[0], CHART[1] + 18 * math.ceil(len(lines) / 2) + 8
    keys = []
    for i, line in enumerate(lines):
        x, y = 14 + 250 * (i % 2), CHART[1] + 10 + 18 * (i // 2)
        keys.append(
            f'<g class="line s{line.style}"><path d="M{x} {y}h24"/></g>'
            f'<text class="tick" x="{x + 30}" y="{y + 4}">{escape(line.label)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><style>{_style()}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{drawing}{"".join(keys)}</svg>\n'
    )


def _style() -> str:
    base = (
        "text{font:11px system-ui,sans-serif;fill:#5b6470}.grid{stroke:#d8dde3}"
        ".line path{fill:none;stroke-width:1.8}"
    )
    return base + "".join(
        f".s{i} path{{stroke:{color};stroke-dasharray:{dash or 'none'}}}"
        f".s{i} circle{{fill:{color}}}"
        for i, (color, dash) in enumerate(LINES)
    )


def _number(value: Value) -> float | None:
    return value if isinstance(value, (int, float)) else None
