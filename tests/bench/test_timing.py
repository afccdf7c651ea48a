"""Rounds, ratios and steps of a comparison."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from evolora.bench.timing import Clock, Comparison, Variant, one_thread
from evolora.errors import ConfigError

ONCE = ("forward",)


class Script(Clock):
    """Runs the call and returns the next of the given durations."""

    def __init__(self, durations: Iterator[float]) -> None:
        self.durations = durations

    def seconds(self, call: Callable[[], Any]) -> float:
        call()
        return next(self.durations)


class Table(Clock):
    """Returns what a table says of the variant that ran, in the round that is on."""

    def __init__(self, **durations: list[float]) -> None:
        self.durations, self.ran, self.comparison = durations, "", None

    def seconds(self, call: Callable[[], Any]) -> float:
        call()
        return self.durations[self.ran][len(self.comparison.rounds)]


def test_a_ratio_is_the_median_of_per_round_ratios_and_stands_beside_that_of_the_minima() -> None:
    clock = Table(base=[1.0, 10.0, 2.0], other=[3.0, 20.0, 3.0])

    def variant(name: str) -> Variant:
        def run(x: torch.Tensor) -> torch.Tensor:
            clock.ran = name
            return x

        return Variant(name=name, run=run, passes=ONCE, forward_base="base")

    comparison = Comparison([variant("base"), variant("other")], [torch.ones(1)], clock)
    clock.comparison = comparison
    comparison.warm_up()
    for _ in range(3):
        comparison.play_round()
    ratio = comparison.ratio("other", "forward")
    assert ratio is not None
    assert ratio.median == 2.0  # of 3, 2, 1.5; the ratio of the medians would be 1.5
    assert ratio.of_minima == 3.0
    assert comparison.seconds("other", "forward") == 3.0
    base, other = ("base", "forward"), ("other", "forward")
    assert comparison.extra(other, base, base) == 1.0  # of 2, 1, 0.5


def test_every_round_times_every_cell_once_in_an_order_of_its_own() -> None:
    ran: list[str] = []

    def variant(name: str) -> Variant:
        def run(x: torch.Tensor) -> torch.Tensor:
            ran.append(name)
            return x

        return Variant(name=name, run=run, passes=ONCE, forward_base="0")

    names = [str(number) for number in range(6)]
    comparison = Comparison(
        [variant(name) for name in names], [torch.ones(1)], Script(itertools.repeat(1.0)), seed=1
    )
    comparison.warm_up()
    ran.clear()
    for _ in range(4):
        comparison.play_round()
    rounds = [tuple(ran[start + 1 : start + 7]) for start in range(0, 28, 7)]
    assert [ran[start] for start in range(0, 28, 7)] == [order[0] for order in rounds]  # to warm up
    assert all(sorted(order) == names for order in rounds)
    assert len(set(rounds)) > 1


def test_short_calls_are_repeated_and_their_time_divided() -> None:
    calls = 0

    def run(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x

    only = Variant(name="v", run=run, passes=ONCE, forward_base="v")
    comparison = Comparison([only], [torch.ones(1)], Script(iter([0.05, 0.001, 0.02])))
    comparison.warm_up()
    calls = 0
    comparison.play_round()
    assert calls == 1 + 10
    assert comparison.seconds("v", "forward") == pytest.approx(0.002)


def test_inputs_are_handed_out_in_turn() -> None:
    seen: list[float] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(float(x))
        return x

    only = Variant(name="v", run=run, passes=ONCE, forward_base="v")
    inputs = [torch.tensor(float(i)) for i in range(3)]
    comparison = Comparison([only], inputs, Script(itertools.repeat(1.0)))
    for _ in range(6):
        comparison.play_round()
    assert sorted(seen) == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


def test_a_step_runs_backward_and_leaves_no_gradient_and_a_forward_builds_no_graph() -> None:
    layer = nn.Linear(3, 3)
    reached: list[torch.Tensor] = []
    layer.weight.register_hook(reached.append)
    grads: list[bool] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        grads.append(torch.is_grad_enabled())
        return layer(x)

    ended: list[bool] = []
    variant = Variant(
        name="v",
        run=run,
        modules=(layer,),
        after=lambda: ended.append(layer.weight.grad is not None),
    )
    x = torch.ones(2, 3, requires_grad=True)
    variant.once("forward", x)
    variant.once("step", x)
    assert grads == [False, True] and ended == [True]
    assert len(reached) == 1 and reached[0].abs().sum() > 0
    assert layer.weight.grad is None and x.grad is None


def test_unknown_names_are_refused_with_the_nearest_one() -> None:
    variant = Variant(name="frozen base", run=lambda x: x, passes=ONCE)
    with pytest.raises(ConfigError, match="did you mean 'frozen base'"):
        Comparison(
            [variant, Variant(name="b", run=lambda x: x, passes=ONCE, forward_base="frozen bas")],
            [torch.ones(1)],
            Script(itertools.repeat(1.0)),
        )
    comparison = Comparison([variant], [torch.ones(1)], Script(itertools.repeat(1.0)))
    with pytest.raises(ConfigError, match="unknown variant 'frozen'"):
        comparison.ratio("frozen", "forward")
    with pytest.raises(ConfigError, match="different names"):
        Comparison([variant, variant], [torch.ones(1)], Script(itertools.repeat(1.0)))


def test_one_thread_is_given_back() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
