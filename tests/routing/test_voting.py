"""The voting table of D-MoLE's specification (A.4.4), and what holds for all of its selectors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from evolora.errors import ConfigError
from evolora.routing.autoencoders import (
    AutoEncoderBank,
    AutoEncoderTraining,
    UnitAutoEncoderTraining,
    _by_epochs,
)
from evolora.routing.route import BASE
from evolora.routing.selector import AutoEncoderSelector, RecogniserConfig
from evolora.routing.voting import ballots, elected, elected_helper

TASKS = 3


def errors_of(*votes: tuple[int, int]) -> Tensor:
    """Rows of errors under thresholds of .1: (how many rows, their task; 0 is nobody)."""
    rows = []
    for count, task in votes:
        row = [0.2] * TASKS
        if task:
            row[task - 1] = 0.05
        rows += [row] * count
    return torch.tensor(rows)


def selector(
    thresholds: tuple[float, ...] = (0.1, 0.1, 0.1), **options: Any
) -> AutoEncoderSelector:
    """A selector whose errors are its features."""
    made = AutoEncoderSelector(RecogniserConfig(feature="layers"), TASKS, **options)
    for threshold in thresholds:
        made._add_threshold(threshold)
        stacks = (*made.bank.networks(), made.bank.center)
        made.bank.add([torch.zeros(stack.shape) for stack in stacks])
    made.bank.errors = lambda values: values  # type: ignore[method-assign]
    return made


def chosen(found: Any, row: int = 0) -> set[int]:
    """Tasks of a row, counted from one as in the specification."""
    helper = BASE if found.helpers is None else int(found.helpers[row])
    return {task + 1 for task in (int(found.tasks[row]), helper) if task != BASE}


def evaluated(errors: Tensor, **options: Any) -> set[int]:
    made = selector(router="batch-vote", helper="threshold", **options)
    return chosen(made.select({"layers": errors}, len(errors), None))


def trained(errors: Tensor, task: int) -> set[int]:
    """Tasks that answer while a task, counted from one, is learned."""
    made = selector((0.1,) * TASKS, router="batch-vote", helper="threshold")
    helpers = made.helpers({"layers": errors}, torch.full((len(errors),), task - 1))
    assert helpers is not None and len(set(helpers.tolist())) == 1
    return {task, int(helpers[0]) + 1} - {0}


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (errors_of((4, 1)), {1}),
        (errors_of((4, 0)), set()),
        (errors_of((7, 1), (3, 2)), {1, 2}),
        (errors_of((8, 1), (2, 2)), {1}),
        (errors_of((5, 3), (5, 2)), {2, 3}),
        (torch.tensor([[0.1, 0.2, 0.2]]), set()),
    ],
    ids=["all", "nobody", "0.3 of them", "too few", "tied", "equal to its threshold"],
)
def test_A_4_4_voting_in_evaluation(errors: Tensor, expected: set[int]) -> None:
    assert evaluated(errors) == expected


def test_A_4_4_of_tied_tasks_the_first_answers() -> None:
    votes = ballots(errors_of((5, 3), (5, 2)), errors_of((5, 3), (5, 2)) < 0.1)
    assert elected(votes) == [1, 2]


def test_A_4_4_voting_in_training() -> None:
    assert trained(errors_of((4, 0)), 4) == {4}
    assert trained(errors_of((1, 1), (9, 0)), 4) == {4, 1}, "one valid vote is all of them"
    assert trained(errors_of((1, 1), (1, 2), (1, 3)), 4) == {4, 1}, "a third is enough"
    four = torch.tensor([0, 1, 2, 2, 3, 3, 1, 0])
    assert elected_helper(four) == BASE, "a quarter is not"
    assert trained(errors_of((4, 2)), 1) == {1}, "the first task has nobody before it"
    assert trained(errors_of((3, 3), (1, 1)), 2) == {2, 1}, "later tasks have no vote"


@pytest.mark.parametrize("router", ["per-sample", "batch-vote"])
def test_A_4_4_the_best_passing_task_wins_not_the_best(router: Any) -> None:
    made = selector((0.1, 0.1, 0.005), router=router)
    assert chosen(made.select({"layers": torch.tensor([[0.09, 0.08, 0.01]])}, 1, None)) == {2}


def test_thresholds_are_strict_and_nothing_of_nan_passes() -> None:
    made = selector()
    rows = torch.tensor([[0.1, 0.2, 0.2], [0.0999, 0.2, 0.2], [torch.nan, torch.nan, torch.nan]])
    assert made.select({"layers": rows}, 3, None).tasks.tolist() == [BASE, 0, BASE]


def test_a_helper_comes_before_the_task_and_is_the_same_in_training_and_at_test() -> None:
    made = selector(helper="threshold")
    own = [[0.05, 0.02, 0.2], [0.02, 0.05, 0.2], [0.06, 0.05, 0.01], [0.2, 0.2, 0.01]]
    rows = torch.tensor([*own, [0.2, 0.2, 0.2]])
    found = made.select({"layers": rows}, 5, None)
    assert found.tasks.tolist() == [1, 0, 2, 2, BASE]
    assert found.helpers is not None
    assert found.helpers.tolist() == [0, BASE, 1, BASE, BASE]
    again = made.helpers({"layers": rows}, found.tasks)
    assert again is not None and torch.equal(again, found.helpers)
    # while task 2 was learned there were two auto-encoders: the same rows had the same helpers
    before = selector((0.1, 0.1), helper="threshold")
    early = before.helpers({"layers": rows[2:4, :2]}, torch.tensor([2, 2]))
    assert early is not None and early.tolist() == found.helpers[2:4].tolist()


def test_who_may_help() -> None:
    rows = torch.tensor([[0.3, 0.2, 0.01], [0.05, 0.2, 0.01]])
    nearest = selector(helper="nearest").select({"layers": rows}, 2, None)
    assert nearest.helpers is not None and nearest.helpers.tolist() == [1, 0]
    nobody = selector(helper="none")
    assert nobody.select({"layers": rows}, 2, None).helpers is None
    assert not nobody.helps and selector(helper="nearest").helps
    assert not selector((), helper="nearest").helps, "nothing was learned before"


def test_an_oracle_tells_the_task_and_auto_encoders_who_helps() -> None:
    made = selector(router="oracle", helper="threshold")
    rows = torch.tensor([[0.05, 0.2, 0.2], [0.2, 0.01, 0.2]])
    told = made.select({"layers": rows}, 2, 2)
    assert told.tasks.tolist() == [2, 2]
    assert told.helpers is not None and told.helpers.tolist() == [0, 1]
    unlearned = made.select({"layers": rows}, 2, None)
    assert unlearned.tasks.tolist() == [BASE, BASE]
    assert unlearned.helpers is not None and unlearned.helpers.tolist() == [BASE, BASE]


def test_per_sample_a_row_is_decided_alone_and_by_vote_it_is_not() -> None:
    rows = errors_of((3, 1), (2, 2), (1, 0))
    alone = selector().select({"layers": rows}, 6, None)
    assert alone.tasks.tolist() == [0, 0, 0, 1, 1, BASE]
    voted = selector(router="batch-vote").select({"layers": rows}, 6, None)
    assert voted.tasks.tolist() == [0] * 6 and voted.helpers is None


def test_zero_is_one_over_the_width_away_and_a_fresh_network_a_quarter() -> None:
    width = 3072
    rows = torch.randn(20, width, generator=torch.Generator().manual_seed(0))
    fresh = AutoEncoderBank(width, 128, "unit")
    fresh.fit(rows, UnitAutoEncoderTraining(steps=0, start="random"), 0)
    torch.testing.assert_close(fresh.errors(rows), torch.full((20, 1), 0.2506), atol=2e-3, rtol=0)
    zero = AutoEncoderBank(width, 128, "unit")
    shapes = ((width, 128), (128,), (128, width))
    silent = [torch.full((width,), -50.0), torch.zeros(width)]  # decoder's bias, and no centre
    zero.add([*(torch.zeros(shape) for shape in shapes), *silent])
    errors = zero.errors(7 * rows)
    torch.testing.assert_close(errors, torch.full((20, 1), 1 / width), rtol=1e-5, atol=0)
    assert zero.parameters_per_task() == 789_632


def family(task: int, rows: int, seed: int) -> Tensor:
    """Unit-like features of tasks that have most in common, as tasks of one model have."""
    own = torch.Generator().manual_seed(100 + task)
    common = torch.randn(64, generator=torch.Generator().manual_seed(9)).abs()
    center = common + 0.3 * torch.randn(64, generator=own)
    draw = torch.Generator().manual_seed(1000 * task + seed)
    return center + 0.1 * torch.randn(rows, 64, generator=draw)


def test_the_default_recognises_tasks_of_a_few_hundred_samples() -> None:
    made = AutoEncoderSelector(RecogniserConfig(feature="layers"), 64, helper="threshold")
    for task in range(3):
        made.learn(task, family(task, 300, 0), family(task, 60, 1), seed=task)
    for task in range(3):
        tasks = made.select({"layers": family(task, 100, 2)}, 100, None).tasks
        assert (tasks == task).float().mean() > 0.85
    stranger = made.select({"layers": family(7, 50, 2)}, 50, None).tasks
    assert (stranger == BASE).float().mean() > 0.9


def test_training_by_epochs_falls_along_a_cosine_and_stops_when_it_gains_no_more() -> None:
    recipe = AutoEncoderTraining(
        hidden=16, squash="unit", epochs=40, batch_size=50, learning_rate=5e-3, patience=3
    )
    losses = iter([5.0, 4.0, 4.0, 3.0, *[3.0] * 40])
    seen: list[tuple[int, float]] = []

    def learn(rows: Tensor, rate: float) -> float:
        seen.append((len(rows), rate))
        return next(losses)

    _by_epochs(recipe, 40, torch.Generator(), learn)
    assert len(seen) == 7 and {size for size, _ in seen} == {40}
    rates = [rate for _, rate in seen]
    assert rates[0] == 5e-3 and rates == sorted(rates, reverse=True)
    assert rates[6] == pytest.approx(1e-3 + 4e-3 * (1 + math.cos(math.pi * 6 / 40)) / 2)
    bank = AutoEncoderBank(64, 16, "unit")
    bank.fit(family(0, 200, 0), recipe, 3)
    assert bank.errors(family(0, 50, 5)).mean() < 0.05


def test_a_feature_that_a_backbone_lacks_is_named() -> None:
    from tests.contract.cases import toy_backbone

    from evolora.methods.d_mole import DMoLE, DMoLEConfig

    config = DMoLEConfig(selector=RecogniserConfig(feature="max-pooled"))
    with pytest.raises(ConfigError, match="selector feature 'max-pooled'"):
        DMoLE(config, toy_backbone("clip"))
