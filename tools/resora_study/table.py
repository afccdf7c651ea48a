"""The study's tables in Markdown, from its finished cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from resora_study.cells import SEEDS, Line
from resora_study.conditions import CONDITIONS, NONE
from resora_study.data import TASKS
from resora_study.hosts import HOSTS

QUANTILE = 2.776
"""Of Student's t with 4 degrees of freedom, for intervals of 95 % over five seeds."""
WAYS = tuple(f"R@{k} {way}" for way in ("image to text", "text to image") for k in (1, 5, 10))
Arm = tuple[str, str, str]
"""Task, host, condition."""


def tables(lines: Iterable[Line]) -> str:
    """Returns all tables; an arm that has not been tested with every seed is left empty."""
    arms = tested(lines)
    parts = [*(_scores(arms, task) for task in TASKS), _overall(arms), _recalls(arms)]
    return "\n".join(parts)


def tested(lines: Iterable[Line]) -> dict[Arm, list[Line]]:
    """Returns the test cells of each arm in the order of seeds, where all are there."""
    found: dict[Arm, dict[int, Line]] = {}
    for line in lines:
        if line["stage"] == "test":
            arm = (line["task"], line["host"], line["condition"])
            found.setdefault(arm, {})[line["seed"]] = line
    return {
        arm: [cells[seed] for seed in SEEDS]
        for arm, cells in found.items()
        if set(cells) == set(SEEDS)
    }


def spread(values: Sequence[float]) -> str:
    """Returns mean ± standard deviation."""
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def interval(values: Sequence[float]) -> str:
    """Returns the mean of paired differences and its 95 % interval; bold where 0 is outside."""
    mean = statistics.fmean(values)
    half = QUANTILE * statistics.stdev(values) / math.sqrt(len(values))
    text = f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"
    return f"**{text}**" if abs(mean) > half else text


def gains(arms: Mapping[Arm, Sequence[Line]], arm: Arm) -> list[float] | None:
    """Returns by how much an arm is better than no regulariser, seed by seed."""
    task, host, _ = arm
    own, plain = arms.get(arm), arms.get((task, host, NONE))
    if own is None or plain is None:
        return None
    return [a["score"] - b["score"] for a, b in zip(own, plain, strict=True)]


def _scores(arms: Mapping[Arm, Sequence[Line]], task: str) -> str:
    def cell(condition: str, host: str) -> str:
        cells = arms.get((task, host, condition))
        if cells is None:
            return "–"
        text = f"{spread([line['score'] for line in cells])} ({cells[0]['strength']:g})"
        if condition == NONE:
            return text
        return f"{text}<br>{interval(gains(arms, (task, host, condition)) or [])}"

    return _markdown(task, CONDITIONS, HOSTS, cell)


def _overall(arms: Mapping[Arm, Sequence[Line]]) -> str:
    """The gain over tasks and hosts: of the hosts that all measures can have, and of all."""
    kinds = {"hosts with activations": [h for h in HOSTS if h != "adalora"], "all hosts": HOSTS}

    def cell(condition: str, kind: str) -> str:
        each = [gains(arms, (task, host, condition)) for task in TASKS for host in kinds[kind]]
        known = [values for values in each if values is not None]
        if len(known) < len(each):
            return "–"
        return interval([statistics.fmean(of_seed) for of_seed in zip(*known, strict=True)])

    return _markdown(
        "gain", [name for name in CONDITIONS if name != NONE], list(kinds), cell
    )  # fmt: skip


def _recalls(arms: Mapping[Arm, Sequence[Line]]) -> str:
    def cell(condition: str, way: str) -> str:
        found = [
            [line[way] for line in cells]
            for host in HOSTS
            if host != "adalora" and (cells := arms.get(("retrieval", host, condition)))
        ]
        if len(found) < len(HOSTS) - 1:
            return "–"
        return f"{statistics.fmean(value for values in found for value in values):.1f}"

    return _markdown("recall", CONDITIONS, WAYS, cell)


def _markdown(
    title: str, rows: Iterable[str], columns: Sequence[str], cell: Callable[[str, str], str]
) -> str:
    lines = [f"| {title} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for row in rows:
        lines.append(f"| {row} | {' | '.join(cell(row, column) for column in columns)} |")
    return "\n".join([*lines, ""])
