"""Means, paired differences and ranks over the cells of a comparison.

A key is (order, seed): cells of two methods with the same key learned the same tasks in the same
order from the same draws, so their difference is free of what both share, and differences are taken
key by key before anything is averaged.

Intervals are Student's t, mean ± t(n - 1) s / sqrt(n). With three to ten seeds a bootstrap draws
again from three to ten numbers: its interval can never leave their range and is too narrow. The t
interval is wide where there are few seeds, and says so; it takes differences to be about normal.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, TypeVar

LEVEL = 0.95
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Number of values, their mean and sample standard deviation (n - 1; None of one value)."""

    n: int
    mean: float
    std: float | None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Difference(Summary):
    """Summary of paired differences and the t interval of their mean (None of one pair)."""

    low: float | None
    high: float | None


def summarize(values: Sequence[float]) -> Summary | None:
    """Return n, mean and standard deviation; None of nothing."""
    if not values:
        return None
    spread = stdev(values) if len(values) > 1 else None
    return Summary(n=len(values), mean=fmean(values), std=spread)


def paired_difference(
    mine: Mapping[Key, float], reference: Mapping[Key, float], *, level: float = LEVEL
) -> Difference | None:
    """Return mine minus reference over the keys that both have; None where there is none.

    Args:
        mine: (order, seed) -> score.
        reference: the same of the method that is compared with.
        level: of the confidence interval, in (0, 1).
    """
    found = summarize([value - reference[key] for key, value in mine.items() if key in reference])
    if found is None:
        return None
    low = high = None
    if found.std is not None:
        half = t_quantile(0.5 + level / 2, found.n - 1) * found.std / math.sqrt(found.n)
        low, high = found.mean - half, found.mean + half
    return Difference(n=found.n, mean=found.mean, std=found.std, low=low, high=high)


def ranks(values: Sequence[float], *, more_is_better: bool = True) -> list[float]:
    """Return the rank of each value, 1 the best; equal values share the mean of their ranks."""
    sign = -1 if more_is_better else 1
    ordered = sorted(sign * value for value in values)
    return [ordered.index(sign * value) + (1 + ordered.count(sign * value)) / 2 for value in values]


@dataclass(frozen=True, kw_only=True)
class StreamRank:
    """Mean rank of a method on one stream: over ``n`` keys, among at most ``of`` methods."""

    rank: float
    of: int
    n: int


def stream_ranks(
    scores: Mapping[str, Mapping[Key, float]], *, more_is_better: bool = True
) -> dict[str, StreamRank]:
    """Return the mean rank of each method on one stream.

    Under each key the methods that have it are ranked; a method's rank is the mean over its keys.
    So a method with an unfinished cell is not compared with cells that it does not have.

    Args:
        scores: method -> (order, seed) -> score.
        more_is_better: False where the smallest score is the best.
    """
    found: dict[str, list[tuple[float, int]]] = {}
    for key in dict.fromkeys(key for own in scores.values() for key in own):
        there = [name for name, own in scores.items() if key in own]
        placed = ranks([scores[name][key] for name in there], more_is_better=more_is_better)
        for name, rank in zip(there, placed, strict=True):
            found.setdefault(name, []).append((rank, len(there)))
    return {
        name: StreamRank(
            rank=fmean(rank for rank, _ in places),
            of=max(among for _, among in places),
            n=len(places),
        )
        for name, places in found.items()
    }


def t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution, by bisection of its distribution function.

    Args:
        probability: in [0.5, 1).
        freedom: degrees of freedom, at least 1.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(
            f"probability must be in [0.5, 1), freedom at least 1; got {probability}, {freedom}"
        )
    low, high = 0.0, 1.0
    while t_distribution(high, freedom) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (
            (middle, high) if t_distribution(middle, freedom) < probability else (low, middle)
        )
    return (low + high) / 2


def t_distribution(value: float, freedom: int) -> float:
    """Return P(T <= value) of Student's t with a whole number of degrees of freedom.

    The finite series in the angle atan(value / sqrt(freedom)): Abramowitz and Stegun, Handbook of
    Mathematical Functions, 26.7.3 (odd) and 26.7.4 (even).
    """
    angle = math.atan(value / math.sqrt(freedom))
    cosine = math.cos(angle)
    even = freedom % 2 == 0
    term, total = (1.0, 1.0) if even else (cosine, cosine)
    for step in range(2 if even else 3, freedom, 2):
        term *= cosine * cosine * (step - 1) / step
        total += term
    if even:
        return 0.5 + 0.5 * math.sin(angle) * total
    tail = math.sin(angle) * total if freedom > 1 else 0.0
    return 0.5 + (angle + tail) / math.pi
