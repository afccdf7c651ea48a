"""Who gets an expert: the golden cases of D-MoLE's allocator, and what holds for any scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolora.errors import ConfigError
from evolora.experts.budget import Candidate, choose_experts


def modules(language: Sequence[float], vision: Sequence[float]) -> list[Candidate]:
    """Candidates L0, L1, ... and V0, V1, ...; vision is named first: it gets the halves."""
    towers = {"V": vision, "L": language}
    return [
        Candidate(name=f"{tower}{index}", tower=tower, score=score)
        for tower, scores in towers.items()
        for index, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("language", "vision", "expected"),
    [
        ((4, 3, 2, 1), (8, 1, 0.5, 0.5), "L0 L1 V0 V1"),
        ((40, 30, 20, 10), (1, 2, 3, 4), "L0 L1 L2 V3"),  # the share rounds to 0, the floor lifts
        ((9, 9, 9, 1), (1, 1, 1, 1), "L0 L1 L2 V1"),
        ((5, 5, 5, 5), (5, 5, 5, 5), "L1 L3 V1 V3"),
        ((1, 2, 3, 4), (40, 30, 20, 10), "V0 V1 V2 V3"),  # the authors' code stops here
    ],
)
def test_golden_cases(language: Sequence[float], vision: Sequence[float], expected: str) -> None:
    chosen = choose_experts(modules(language, vision), 4, floors={"V": 0.25})
    assert sorted(chosen) == expected.split()


SCORES = st.lists(st.one_of(st.sampled_from([0.0, 1.0, 2.5]), st.floats(1e-6, 1e6)), min_size=1)
THREE = st.tuples(SCORES, SCORES, SCORES)
TOWERS = ("vision", "text", "audio")


def candidates(
    scores: Sequence[Sequence[float]], scale: Sequence[float] = (1, 1, 1)
) -> list[Candidate]:
    return [
        Candidate(name=f"{tower}.{index}", tower=tower, score=score * factor)
        for tower, own, factor in zip(TOWERS, scores, scale, strict=True)
        for index, score in enumerate(own)
    ]


def slots(chosen: Sequence[str]) -> dict[str, int]:
    return {tower: sum(name.startswith(tower) for name in chosen) for tower in TOWERS}


@given(THREE, st.integers(1, 40), st.sampled_from([{}, {"text": 0.3}, {"text": 0.5, "audio": 0.5}]))
def test_budget_is_used_exactly_and_floors_hold(
    scores: tuple[list[float], ...], budget: int, floors: dict[str, float]
) -> None:
    every = candidates(scores)
    chosen = choose_experts(every, budget, floors=floors)
    assert len(chosen) == len(set(chosen)) == min(budget, len(every))
    own = slots(chosen)
    for tower, share in floors.items():
        size = len(scores[TOWERS.index(tower)])
        assert own[tower] >= min(size, math.floor(share * budget + 1e-9))
    for tower, of_tower in zip(TOWERS, scores, strict=True):  # the best of each tower
        inside = [of_tower[i] for i in range(len(of_tower)) if f"{tower}.{i}" in chosen]
        outside = [of_tower[i] for i in range(len(of_tower)) if f"{tower}.{i}" not in chosen]
        assert not inside or not outside or min(inside) >= max(outside)


@given(THREE, st.integers(1, 40), st.sampled_from([1e-3, 0.1, 3.0, 7.7, 1e4]))
def test_scale_of_all_scores_changes_nothing(
    scores: tuple[list[float], ...], budget: int, factor: float
) -> None:
    scaled = candidates(scores, (factor,) * 3)
    assert choose_experts(candidates(scores), budget) == choose_experts(scaled, budget)


@given(THREE, st.integers(1, 40), st.sampled_from([1.01, 2.0, 50.0]), st.integers(0, 2))
def test_a_tower_that_grows_never_loses_slots(
    scores: tuple[list[float], ...], budget: int, factor: float, which: int
) -> None:
    floors = {"text": 0.2}
    scale = [factor if place == which else 1.0 for place in range(3)]
    before = slots(choose_experts(candidates(scores), budget, floors=floors))
    after = slots(choose_experts(candidates(scores, scale), budget, floors=floors))
    if any(scores[which]):  # of a tower whose scores are zero, nothing grows
        assert after[TOWERS[which]] >= before[TOWERS[which]]


@given(SCORES, SCORES, st.integers(1, 30))
def test_two_towers_share_as_the_formula_says(
    vision: list[float], text: list[float], budget: int
) -> None:
    both = modules(text, vision)
    if budget > len(both) or sum(vision) + sum(text) == 0:
        return
    share = budget * sum(vision) / (sum(vision) + sum(text))
    if abs(share % 1 - 0.5) < 1e-6:
        return  # a half goes to the first; sums round
    wanted = int(share + 0.5)
    wanted = min(max(wanted, budget - len(text)), len(vision))  # a full tower leaves the rest
    chosen = choose_experts(both, budget)
    assert sum(name.startswith("V") for name in chosen) == wanted


@given(THREE, st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 60))
def test_a_budget_of_parameters_is_not_exceeded_and_nothing_else_fits(
    scores: tuple[list[float], ...], costs: list[int], budget: int
) -> None:
    every = [
        Candidate(name=c.name, tower=c.tower, score=c.score, cost=costs[place % len(costs)])
        for place, c in enumerate(candidates(scores))
    ]
    chosen = choose_experts(every, budget, floors={"audio": 0.4})
    used = sum(c.cost for c in every if c.name in chosen)
    assert used <= budget
    assert all(used + c.cost > budget for c in every if c.name not in chosen)


def test_without_curriculum_towers_share_by_size() -> None:
    every = modules((1, 1, 1, 1, 1, 1), (100, 90, 80))
    assert sorted(choose_experts(every, 3)) == ["V0", "V1", "V2"]
    assert sum(n.startswith("V") for n in choose_experts(every, 3, curriculum=False)) == 1


def test_scores_that_are_all_zero_share_by_size() -> None:
    chosen = choose_experts(modules((0, 0, 0, 0), (0, 0)), 3)
    assert sorted(name[0] for name in chosen) == ["L", "L", "V"]


def test_ties_are_drawn_by_seed() -> None:
    every = modules((1,) * 8, (1,) * 8)
    draws = {tuple(choose_experts(every, 6, tie_seed=seed)) for seed in range(5)}
    assert len(draws) > 1
    assert choose_experts(every, 6, tie_seed=3) == choose_experts(every, 6, tie_seed=3)


def test_wrong_input_is_named() -> None:
    every = modules((1, 2), (3, 4))
    with pytest.raises(ConfigError, match="score of 'L1' is nan"):
        choose_experts(modules((1, math.nan), (3, 4)), 2)
    with pytest.raises(ConfigError, match="score of 'V0' is -3"):
        choose_experts(modules((1, 2), (-3, 4)), 2)
    with pytest.raises(ConfigError, match=r"unknown tower in floors 'Vi'"):
        choose_experts(every, 2, floors={"Vi": 0.1})
    with pytest.raises(ConfigError, match=r"floors\['V'\] must be in \[0, 1\]; got 1.5"):
        choose_experts(every, 2, floors={"V": 1.5})
    with pytest.raises(ConfigError, match="floors must not exceed 1 together"):
        choose_experts(every, 2, floors={"V": 0.7, "L": 0.7})
