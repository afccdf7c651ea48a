"""Merging: experts that are on for every row are folded into a cached weight of their Linear."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AlwaysOn:
    """Linear experts that a route gives to every row, with constant gates.

    Args:
        ids: identifiers of the experts.
        gates: their weights; None for ones.
    """

    ids: tuple[int, ...]
    gates: tuple[float, ...] | None = None
