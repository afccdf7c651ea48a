"""Seeded choices among samples with several labels, by their labels alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # listing the streams' names must not import torch
    import torch

MultiHot = Sequence[tuple[int, ...]]


def balanced_rows(labels: MultiHot, limit: int, rng: torch.Generator) -> list[int]:
    """Return ``limit`` random rows that hold the classes as equally often as they can.

    Rule: the class that the chosen rows hold least often (of those with rows left; ties in a random
    order of classes) gives its next random row, and that row counts for all its labels. Samples
    without any label are a class of their own. Rows keep their order.
    """
    groups = _shuffled(labels, rng)
    held = dict.fromkeys(groups, 0)
    chosen: set[int] = set()
    while len(chosen) < limit:
        for rows in groups.values():
            while rows and rows[-1] in chosen:
                rows.pop()
        least = min((name for name, rows in groups.items() if rows), key=held.__getitem__)
        row = groups[least].pop()
        chosen.add(row)
        for name in _classes(labels[row]):
            held[name] += 1
    return sorted(chosen)


def held_rows(labels: MultiHot, fraction: float, rng: torch.Generator) -> set[int]:
    """Return rows to hold out: about ``fraction`` of the rows of every class.

    Rule: from the rarest class to the most common, random rows are held out until the class has
    given round(fraction * its rows), at least one, rows held for rarer classes included. A row is
    held only while each of its classes keeps another one, so every class is learned. Samples
    without any label are a class of their own.
    """
    groups = _shuffled(labels, rng)
    kept = {name: len(rows) for name, rows in groups.items()}
    held: set[int] = set()
    for rows in sorted(groups.values(), key=len):
        quota = max(1, round(fraction * len(rows)))
        given = sum(row in held for row in rows)
        for row in rows:
            if given >= quota:
                break
            names = _classes(labels[row])
            if row not in held and all(kept[name] > 1 for name in names):
                held.add(row)
                given += 1
                for name in names:
                    kept[name] -= 1
    return held


def _classes(label: tuple[int, ...]) -> tuple[int, ...]:
    """Return the classes of a sample; (-1,) for none."""
    return tuple(place for place, value in enumerate(label) if value) or (-1,)


def _shuffled(labels: MultiHot, rng: torch.Generator) -> dict[int, list[int]]:
    """Return class -> its rows, both in random order."""
    import torch

    by_class: dict[int, list[int]] = {}
    for row in torch.randperm(len(labels), generator=rng).tolist():
        for name in _classes(labels[row]):
            by_class.setdefault(name, []).append(row)
    order = torch.randperm(len(by_class), generator=rng).tolist()
    names = sorted(by_class)
    return {names[place]: by_class[names[place]] for place in order}
