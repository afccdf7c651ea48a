"""Factor pools: golden cases of the repaired formula, gradients, frozen tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evolora.errors import ConfigError
from evolora.experts.factor_pool import FactorConfig, FactorPool


def golden(cfs: bool = True, **given: Any) -> FactorPool:
    mode = "logit_sum" if cfs else "off"
    config = FactorConfig(
        num_factors=4, r=2, alpha=2.0, **{"router_grad": "none", "cfs_mode": mode, **given}
    )
    pool = FactorPool(4, 3, 4, config)
    pool.grow(torch.Generator().manual_seed(0))
    ones = torch.ones(4)
    with torch.no_grad():
        pool.A.active.copy_(torch.stack([*torch.eye(4)[:3], ones]))
        pool.B.active.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, -1, 2]]))
        pool.down_router.active.copy_(torch.eye(4)[None])
        pool.up_router.active.copy_(torch.eye(4).flip(0)[None])
        for offset in (pool.down_offset, pool.up_offset):
            offset.active.zero_()
        if pool.conditional is not None:
            pool.conditional.active.zero_()
            pool.conditional.active[0, 0, 1, 0] = 5.0
            pool.conditional.active[0, 1, 3, 2] = -4.0
    return pool


def update(pool: FactorPool, query: Tensor, uniform: int | None = 0) -> tuple[list, list, Tensor]:
    tasks = torch.zeros(1, dtype=torch.long)
    down, up, gates = pool.choose(query[None], tasks, uniform=uniform)
    factors = pool.factors(down, up, uniform=uniform)
    weight = factors.a[0] if gates is None else factors.a[0] * gates[0][:, None]
    return down[0].tolist(), up[0].tolist(), pool.config.alpha * factors.b[0].T @ weight


@pytest.mark.parametrize("uniform", [0, None])
@pytest.mark.parametrize(
    ("query", "cfs", "down", "up", "rows", "first", "second"),
    [
        (
            (0.5, 0.9, 0.1, 0.7), True, [1, 3], [0, 3],
            [[2, 4, 2, 2], [-2, -2, -2, -2], [4, 4, 4, 4]], (24, -20, 40), (2, 0, 0),
        ),
        (
            (0.5, 0.9, 0.1, 0.7), False, [1, 3], [2, 0],
            [[2, 2, 2, 2], [0, 0, 0, 0], [0, 2, 0, 0]], (20, 0, 4), (0, 0, 2),
        ),
        (
            (0.9, 0.1, 0.7, 0.2), True, [0, 2], [3, 1],
            [[2, 0, 0, 0], [-2, 0, 2, 0], [4, 0, 0, 0]], (2, 4, 4), (0, 0, 0),
        ),
        (
            (0.9, 0.1, 0.7, 0.2), False, [0, 2], [3, 1],
            [[2, 0, 0, 0], [-2, 0, 2, 0], [4, 0, 0, 0]], (2, 4, 4), (0, 0, 0),
        ),
    ],
)  # fmt: skip
def test_golden_experts(query, cfs, down, up, rows, first, second, uniform) -> None:
    """G1, G2: factors, updates and outputs of the small expert."""
    found_down, found_up, dw = update(golden(cfs), torch.tensor(query), uniform)
    assert (found_down, found_up) == (down, up)
    torch.testing.assert_close(dw, torch.tensor(rows, dtype=torch.float32))
    for token, expected in (((1.0, 2, 3, 4), first), ((0.0, 1, 0, -1), second)):
        torch.testing.assert_close(dw @ torch.tensor(token), torch.tensor(expected).float())


def test_golden_gates_of_the_down_factors() -> None:
    """G3: gates are chances renormalised over the chosen."""
    pool = golden(False, router_grad="weighted")
    with torch.no_grad():  # equal chances of the up-factors leave the down-factors' alone
        pool.up_router.active.zero_()
    query = torch.tensor([[0.5, 0.9, 0.1, 0.7]])
    gates = pool.choose(query, torch.zeros(1, dtype=torch.long), uniform=0)[2]
    torch.testing.assert_close(gates / 2, torch.tensor([[0.549834, 0.450166]]), atol=1e-6, rtol=0)


def random_pool(tasks: int = 1, **given: Any) -> FactorPool:
    pool = FactorPool(6, 5, 7, FactorConfig(**{"num_factors": 8, "r": 3, **given}))
    for task in range(tasks):
        pool.grow(torch.Generator().manual_seed(task))
        with torch.no_grad():
            pool.B.active.normal_(generator=torch.Generator().manual_seed(10 + task))
    return pool


@pytest.mark.parametrize("cfs", ["softmax_sum", "logit_sum", "off"])
@pytest.mark.parametrize("how", ["weighted", "straight_through", "none"])
def test_gradients_reach_the_routers_unless_told_not_to(how: str, cfs: str) -> None:
    pool = random_pool(router_grad=how, cfs_mode=cfs)
    query = torch.randn(4, 7, generator=torch.Generator().manual_seed(3))
    down, up, gates = pool.choose(query, torch.zeros(4, dtype=torch.long), uniform=0)
    factors = pool.factors(down, up)
    weights = torch.ones(4, 3) if gates is None else gates
    torch.einsum("brd,bro,br->", factors.a, factors.b, weights).backward()
    assert pool.A.active.grad is not None and pool.B.active.grad is not None
    for name in ("down_router", "up_router", "down_offset", "up_offset"):
        grad = getattr(pool, name).active.grad
        assert (grad is None) if how == "none" else (grad is not None and grad.abs().sum() > 0)
    if pool.conditional is not None and how != "none":
        assert pool.conditional.active.grad.abs().sum() > 0
    if how == "straight_through":
        torch.testing.assert_close(gates, torch.ones(4, 3))
    if how == "weighted":
        torch.testing.assert_close(gates.sum(dim=1), torch.full((4,), 3.0))


@pytest.mark.parametrize("cfs", ["softmax_sum", "logit_sum", "off"])
def test_rows_of_several_tasks_choose_as_alone(cfs: str) -> None:
    pool = random_pool(3, cfs_mode=cfs)
    query = torch.randn(6, 7, generator=torch.Generator().manual_seed(3))
    tasks = torch.tensor([0, 1, 2, 2, 1, 0])
    mixed = pool.choose(query, tasks)
    for row, task in enumerate(tasks.tolist()):
        alone = pool.choose(query[row : row + 1], tasks[row : row + 1], uniform=task)
        for got, expected in zip(mixed, alone, strict=True):
            torch.testing.assert_close(got[row], expected[0])
        assert all(task * 8 <= factor < (task + 1) * 8 for factor in alone[0][0].tolist())


@pytest.mark.parametrize("uniform", [1, None])
def test_conditional_scores_are_those_of_each_chosen_factor(uniform: int | None) -> None:
    pool = random_pool(2)
    draw = torch.Generator().manual_seed(3)
    down = torch.stack([torch.randperm(8, generator=draw)[:3] for _ in range(5)])
    tasks = torch.ones(5, dtype=torch.long) if uniform else torch.tensor([0, 1, 1, 0, 1])
    given = pool._given(down, tasks, uniform)
    for row, task in enumerate(tasks.tolist()):
        for k, factor in enumerate(down[row].tolist()):
            expected = pool.conditional.all()[task, k].T @ pool.A.all()[8 * task + factor]
            torch.testing.assert_close(given[row, k], expected)
    given.sum().backward()
    assert pool.conditional.active.grad.abs().sum() > 0 and pool.A.active.grad is None


@pytest.mark.parametrize("cfs", ["softmax_sum", "logit_sum"])
def test_gates_are_shares_of_the_product_of_chances(cfs: str) -> None:
    pool = random_pool(cfs_mode=cfs)
    query = torch.randn(4, 7, generator=torch.Generator().manual_seed(3))
    tasks = torch.zeros(4, dtype=torch.long)
    down, up, gates = pool.choose(query, tasks, uniform=0)
    p_down = pool._scores(pool.down_router, pool.down_offset, query, tasks, 0).softmax(1)
    logits = pool._scores(pool.up_router, pool.up_offset, query, tasks, 0)
    given = pool._given(down, tasks, 0)
    if cfs == "logit_sum":
        p_up = (logits + given.sum(1)).softmax(1)
    else:
        p_up = (logits.softmax(1) + given.softmax(2).sum(1).softmax(1)) / 2
    both = p_down.gather(1, down) * p_up.gather(1, up)
    torch.testing.assert_close(gates, 3 * both / both.sum(1, keepdim=True))


@pytest.mark.parametrize("uniform", [1, None])
def test_up_factors_are_chosen_by_the_tasks_own_down_factors(uniform: int | None) -> None:
    pool = random_pool(2, cfs_mode="logit_sum")
    query = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    tasks = torch.ones(5, dtype=torch.long)
    before = pool.choose(query, tasks, uniform=uniform)[1]
    pool.A.frozen.normal_(generator=torch.Generator().manual_seed(8))
    assert torch.equal(pool.choose(query, tasks, uniform=uniform)[1], before)
    with torch.no_grad():
        pool.A.active.normal_(generator=torch.Generator().manual_seed(8))
    assert not torch.equal(pool.choose(query, tasks, uniform=uniform)[1], before)


def test_the_rank_is_at_most_r_and_a_full_pool_is_a_permutation() -> None:
    """I4, I16: of the update; r = E takes all."""
    pool = random_pool(num_factors=4, r=4, router_grad="none", cfs_mode="off")
    query = torch.randn(7, generator=torch.Generator().manual_seed(1))
    down, up, dw = update(pool, query)
    assert sorted(down) == sorted(up) == [0, 1, 2, 3]
    expected = 2.0 * pool.B.active[up].T @ pool.A.active[down]
    torch.testing.assert_close(dw, expected)
    small = random_pool(r=2)
    assert torch.linalg.matrix_rank(update(small, query)[2]) <= 2


def test_older_pools_are_frozen_bit_for_bit_and_new_ones_give_zero() -> None:
    pool = random_pool()
    before = [stack.all().detach().clone() for stack in pool.stacks()]
    pool.grow(torch.Generator().manual_seed(5))
    for stack, old in zip(pool.stacks(), before, strict=True):
        assert torch.equal(stack.frozen, old) and not stack.frozen.requires_grad
    query = torch.randn(2, 7)
    down, up, _ = pool.choose(query, torch.ones(2, dtype=torch.long), uniform=1)
    assert torch.equal(pool.factors(down, up).b, torch.zeros(2, 3, 5))


@pytest.mark.parametrize(("cfs", "count"), [("softmax_sum", 98_336), ("off", 49_184)])
def test_parameters_of_a_pool_at_vilt_width(cfs: str, count: int) -> None:
    """G11: values of one pool."""
    pool = FactorPool(768, 768, 768, FactorConfig(cfs_mode=cfs), device="meta")
    pool.grow(torch.Generator())
    assert sum(p.numel() for p in pool.parameters()) == count
    assert 72 * count == {"softmax_sum": 7_080_192, "off": 3_541_248}[cfs]


def test_more_factors_per_sample_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"r must be between 1 and num_factors \(4\); got 5"):
        FactorConfig(num_factors=4, r=5)
