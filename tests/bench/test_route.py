"""Regret, and fitting the dispatcher's thresholds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evolora.bench.layer import Shape
from evolora.bench.route import PASSES, Timed, fitted, grid
from evolora.bench.timing import Comparison, HostClock, Variant
from evolora.experts.dispatch import Thresholds

START = Thresholds(
    gather_min_tokens=16,
    gather_max_rank_per_token=2.0,
    stacked_max_rows_single=1024,
    stacked_max_rows_token=256,
    segments_min_rows=32,
)
SAMPLE = Shape(experts=64, r=16, k=2, tokens=1, batch=64)


def timed(shape: Shape, **seconds: float) -> Timed:
    every = {**dict.fromkeys(shape.formulations, 9.0), **seconds}
    best = min(every.values())
    return Timed(shape, {(f, p): s / best for f, s in every.items() for p in PASSES})


def test_slowness_is_the_median_of_rounds_not_of_times() -> None:
    """A machine that slows down by half in between changes no regret."""
    names = ("gather", "segments")
    variants = [
        Variant(name=name, run=lambda x: x, forward_base=name, step_base=name) for name in names
    ]
    comparison = Comparison(variants, [None], HostClock())
    for speed in (1.0, 3.0, 1.0):
        times = {("gather", p): speed for p in PASSES} | {("segments", p): 1.2 for p in PASSES}
        comparison.rounds.append(
            {cell: time * (speed if cell[0] == "segments" else 1.0) for cell, time in times.items()}
        )
    one = Timed.of(SAMPLE, comparison, names)
    assert one.fastest("step") == "gather" and one.slowness["gather", "step"] == 1.0
    assert one.slowness["segments", "step"] == pytest.approx(1.2)


def test_regret_is_the_choice_s_time_over_the_fastest_one_s() -> None:
    one = timed(SAMPLE, stacked=3.0, segments=2.0)
    assert one.choice(START) == "stacked"  # e * r = 1024
    assert one.fastest("step") == "segments"
    assert one.regret(START, "step") == pytest.approx(1.5)
    assert timed(SAMPLE, stacked=1.0).regret(START, "forward") == 1.0


def test_fitting_moves_the_threshold_that_costs_time() -> None:
    small = timed(replace(SAMPLE, experts=8), stacked=1.0)
    large = timed(SAMPLE, grouped=1.0, segments=1.0, stacked=3.0)
    after = fitted([small, large], START)
    assert 128 <= after.stacked_max_rows_single < 1024
    assert all(one.regret(after, which) == 1.0 for one in (small, large) for which in PASSES)


def test_fitting_never_ends_at_a_formulation_that_was_not_timed() -> None:
    shape = replace(SAMPLE, tokens=50, batch=32, r=64)  # k * r = 128 > 2 n: sorted
    untimed = Timed(
        shape, {(f, p): s for f, s in (("gather", 2.0), ("grouped", 1.0)) for p in PASSES}
    )
    assert untimed.choice(START) == "segments"
    assert untimed.regret(START, "step") == float("inf")
    assert untimed.choice(fitted([untimed], START)) == "grouped"


def test_fitting_leaves_alone_what_gains_nothing() -> None:
    assert fitted([timed(SAMPLE, stacked=1.0)], START) == START
    assert fitted([], START) == START


@pytest.mark.parametrize("quick", [False, True])
def test_the_grid_meets_every_formulation_and_both_kinds_of_route(quick: bool) -> None:
    shapes = grid(quick=quick)
    assert {shape.per_token for shape in shapes} == {False, True}
    assert len(set(shapes)) == len(shapes)
    chosen = {timed(shape).choice(START) for shape in shapes}
    assert {"gather", "stacked"} <= chosen and chosen & {"segments", "grouped"}
