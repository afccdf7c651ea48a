"""Costs of an allocation: parameters and depth."""

from __future__ import annotations

import pytest

from evolora.experts.budget import allocation_cost, depth_price


def test_cost_by_hand() -> None:
    assert depth_price(300) == 100 and depth_price(300, cached=True) == 200
    assert allocation_cost(50, 9, 12, 100.0) == 50 + 3 * 100
    assert allocation_cost(50, 0, 12, 100.0) == 50 + 12 * 100
    assert allocation_cost(0, None, 12, 100.0) == 0


def test_half_the_layers_on_top_cost_half_of_half_the_layers_spread_out() -> None:
    price = depth_price(7_000_000)
    spread, top, every = (
        allocation_cost(parameters, lowest, 12, price)
        for parameters, lowest in ((300_000, 0), (300_000, 6), (600_000, 0))
    )
    assert spread / every == pytest.approx(0.99, abs=0.01)
    assert top / every == pytest.approx(0.5, abs=0.02)
