"""Goals and verdicts."""

from __future__ import annotations

import pytest

from evolora.bench import BENCHES
from evolora.bench.goals import GOALS, Goal, judge
from evolora.bench.session import Session
from evolora.bench.settings import Settings
from evolora.errors import ConfigError

UPPER = Goal(key="u", bench="tower", what="", usual="", limit=1.2)
LOWER = Goal(key="l", bench="tower", what="", usual="", limit=2.0, at_least=True)
EQUAL = Goal(key="e", bench="tower", what="", usual="", limit=1.0, noise=0.03)


def test_a_bound_above_and_a_bound_below() -> None:
    assert UPPER.met(1.2) and not UPPER.met(1.21)
    assert LOWER.met(2.0) and not LOWER.met(1.99)
    assert EQUAL.met(1.03) and not EQUAL.met(1.04)


def test_slack_loosens_both_kinds() -> None:
    assert UPPER.met(1.5, slack=0.25) and not UPPER.met(1.51, slack=0.25)
    assert LOWER.met(1.6, slack=0.25) and not LOWER.met(1.59, slack=0.25)


def test_nan_meets_nothing() -> None:
    assert not UPPER.met(float("nan"), slack=1.0) and not LOWER.met(float("nan"), slack=1.0)


def test_every_goal_belongs_to_a_bench() -> None:
    assert {goal.bench for goal in GOALS.values()} <= set(BENCHES)


def test_judging_says_met_within_slack_or_missed() -> None:
    words = {value: judge({"lora-step": value}, slack=0.25)[0].word for value in (1.13, 1.2, 1.5)}
    assert words == {1.13: "met", 1.2: "near", 1.5: "missed"}


def test_an_unknown_goal_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lora-step'"):
        judge({"lora-stepp": 1.0})
    with pytest.raises(ConfigError, match="unknown goal 'x'"):
        Session("tower", Settings()).goal("x", 1.0)


@pytest.mark.parametrize(
    ("settings", "counted"),
    [(Settings(), True), (Settings(quick=True), False), (Settings(batch=2), False)],
)
def test_sizes_are_judged_at_the_standard_setting_only(settings: Settings, counted: bool) -> None:
    session = Session("tower", settings)
    session.goal("moe-saved", 160.0)
    session.goal("moe-step", 1.0)
    session.goal("lora-step", None)
    assert set(session.result.measured) == ({"moe-saved", "moe-step"} if counted else {"moe-step"})
