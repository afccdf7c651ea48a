"""Gates: the numeric cases of specs/moe_adapters.md section 9.2, and routers that grow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evolora.randomness import StepRandom
from evolora.routing.gates import (
    NOISE_FLOOR,
    TaskRouters,
    load_balance,
    prob_in_top_k,
    top_k_softmax,
)

ROWS = torch.tensor([[1.0, 2.0, 3.0, 0.0], [-1.0, -2.0, -3.0, 0.0]])


def dense(logits: torch.Tensor, k: int) -> torch.Tensor:
    ids, gates = top_k_softmax(logits, k)
    return torch.zeros_like(logits).scatter(1, ids, gates)


def test_9_2_gates_of_the_two_rows() -> None:
    expected = torch.tensor([[0, 0.26894143, 0.73105860, 0], [0.26894143, 0, 0, 0.73105860]])
    torch.testing.assert_close(dense(ROWS, 2), expected, rtol=0, atol=1e-7)


def test_9_2_squared_variation_of_the_summed_gates() -> None:
    assert float(load_balance(dense(ROWS, 2))) == pytest.approx(0.28473637, abs=1e-7)


def test_9_2_squared_variation_of_an_equal_load_is_zero() -> None:
    assert float(load_balance(torch.ones(1, 4))) == 0.0
    assert float(load_balance(torch.ones(3, 1))) == 0.0  # one expert is always balanced


def test_9_2_chance_to_be_in_the_top_two() -> None:
    chance = prob_in_top_k(ROWS[:1], ROWS[:1], torch.ones(1, 4), 2)
    expected = torch.tensor([[0.15865526, 0.84134471, 0.97724986, 0.02275014]])
    torch.testing.assert_close(chance, expected, rtol=0, atol=1e-7)


def test_9_2_deviation_of_the_noise_with_zero_weights() -> None:
    routers = TaskRouters(3, 4, 2)
    routers.grow()
    zeros = torch.zeros(50_000, 3)
    random = StepRandom(0)
    noise = random.normal("site/gate", (50_000, 4), zeros)
    std = torch.nn.functional.softplus(torch.zeros(())) + NOISE_FLOOR
    assert float(std) == pytest.approx(0.70314717, abs=1e-7)
    gating = routers(zeros, torch.zeros(50_000, dtype=torch.long), random=random, key="site")
    torch.testing.assert_close(gating.gates, top_k_softmax(std * noise, 2)[1])


def test_the_chance_is_what_redrawing_one_noise_gives() -> None:
    """Monte Carlo over the definition: expert i is drawn again, the others keep their noise."""
    draw = torch.Generator().manual_seed(0)
    clean = torch.randn(1, 5, generator=draw)
    std = torch.rand(1, 5, generator=draw) + 0.5
    noisy = clean + std * torch.randn(1, 5, generator=draw)
    chance = prob_in_top_k(clean, noisy, std, 2)[0]
    for expert in range(5):
        again = noisy.repeat(40_000, 1)
        again[:, expert] = clean[0, expert] + std[0, expert] * torch.randn(40_000, generator=draw)
        share = (again.topk(2, dim=1).indices == expert).any(dim=1).float().mean()
        assert float(share) == pytest.approx(float(chance[expert]), abs=0.012)


def test_9_1_5_exactly_k_gates_that_sum_to_one() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    for k in (1, 2, 7):
        gates = dense(logits, k)
        assert torch.equal((gates != 0).sum(dim=1), torch.full((50,), k))
        torch.testing.assert_close(gates.sum(dim=1), torch.ones(50))
        top = logits.topk(k, dim=1)
        over_selected = torch.softmax(top.values, dim=1)
        torch.testing.assert_close(gates.gather(1, top.indices), over_selected)


def test_ties_go_to_the_smaller_index() -> None:
    """Finding 10: a fresh router is all ties, and its choice must not depend on the machine."""
    ids, gates = top_k_softmax(torch.zeros(3, 40), 2)
    assert ids.tolist() == [[0, 1]] * 3 and gates.tolist() == [[0.5, 0.5]] * 3
    ids, _ = top_k_softmax(torch.tensor([[1.0, 5.0, 5.0, 5.0]]), 2)
    assert ids.tolist() == [[1, 2]]


def test_ties_go_in_the_order_that_is_told() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0], [9.0, 1.0, 1.0, 9.0]])
    expected = {
        (0, 1, 2, 3): [[1, 2], [0, 1], [0, 3]],
        (2, 3, 0, 1): [[2, 3], [2, 3], [3, 0]],
        (3, 0, 2, 1): [[3, 2], [3, 0], [3, 0]],
    }
    for order, ids in expected.items():
        assert top_k_softmax(logits, 2, torch.tensor([order]))[0].tolist() == ids
    each = top_k_softmax(logits, 2, torch.tensor(list(expected)))
    assert each[0].tolist() == [[1, 2], [2, 3], [3, 0]]
    torch.testing.assert_close(each[1].sum(dim=1), torch.ones(3))


def test_a_fresh_router_starts_on_experts_that_may_learn() -> None:
    """The frozen ones may stand anywhere in the pool; a pool that grows adds experts at the end."""
    routers = TaskRouters(3, 5, 2)
    routers.grow()
    routers.grow(last=[0, 2, 4])
    c = torch.randn(4, 3)
    assert routers(c, torch.zeros(4, dtype=torch.long), uniform=0).ids.tolist() == [[0, 1]] * 4
    assert routers(c, torch.ones(4, dtype=torch.long), uniform=1).ids.tolist() == [[1, 3]] * 4
    mixed = torch.tensor([0, 1, 1, 0])
    assert routers(c, mixed).ids.tolist() == [[0, 1], [1, 3], [1, 3], [0, 1]]
    routers.widen(6)
    routers.grow(last=[0, 1, 2, 3, 4])
    assert routers(c, torch.full((4,), 2)).ids.tolist() == [[5, 0]] * 4
    assert routers(c, mixed).ids.tolist() == [[0, 1], [1, 3], [1, 3], [0, 1]]


def filled(d: int = 3, experts: int = 4, tasks: int = 3, k: int = 2) -> TaskRouters:
    routers = TaskRouters(d, experts, k)
    for task in range(tasks):
        routers.grow()
        draw = torch.Generator().manual_seed(task)
        with torch.no_grad():
            for stack in (routers.gate, routers.noise):
                stack.active.copy_(torch.randn(stack.active.shape, generator=draw))
    return routers


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_a_row_is_routed_by_its_own_router(seed: int, noisy: bool) -> None:
    routers = filled()
    draw = torch.Generator().manual_seed(seed)
    c = torch.randn(6, 3, generator=draw)
    tasks = torch.randint(3, (6,), generator=draw)
    random = StepRandom(seed) if noisy else None
    mixed = routers(c, tasks, random=random, key="a")
    for task in range(3):
        rows = tasks == task
        uniform = routers(c, torch.full((6,), task), uniform=task, random=random, key="a")
        assert torch.equal(mixed.ids[rows], uniform.ids[rows])
        torch.testing.assert_close(mixed.gates[rows], uniform.gates[rows])


def test_only_the_newest_router_trains() -> None:
    routers = filled()
    assert routers.gate.frozen_ids() == [0, 1]
    tasks = torch.tensor([0, 1, 2])
    gating = routers(torch.randn(3, 3), tasks, random=StepRandom(0), key="a")
    gating.gates[:, 0].sum().backward()
    assert routers.gate.active.grad.abs().sum() > 0 and routers.noise.active.grad.abs().sum() > 0
    routers.freeze()
    assert not list(p for p in routers.parameters() if p.requires_grad)


def test_old_routers_never_pick_new_experts() -> None:
    routers = filled(tasks=2)
    c = 10 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    old = [routers(c, torch.full((200,), task), uniform=task) for task in (0, 1)]
    routers.widen(9)
    routers.grow()
    with torch.no_grad():  # a strong column would win if an old router could see it
        routers.gate.frozen[:, :, 4:] += 100.0
        routers.gate.active += torch.randn(routers.gate.active.shape)
    for task in (0, 1):
        for kind in ({"uniform": task}, {}):
            now = routers(c, torch.full((200,), task), **kind)
            assert torch.equal(now.ids, old[task].ids)
            torch.testing.assert_close(now.gates, old[task].gates)
        noisy = routers(c, torch.full((200,), task), random=StepRandom(1), key="a", chance=True)
        assert int(noisy.ids.max()) < 4
        assert noisy.chance[:, 4:].abs().max() == 0
    assert int(routers(c, torch.full((200,), 2), uniform=2).ids.max()) >= 4


def test_a_shared_router_adopts_new_experts() -> None:
    routers = filled(tasks=1)
    routers.widen(6, adopt=True)
    with torch.no_grad():
        routers.gate.active[:, :, 5] = 50.0
    ids = routers(torch.ones(1, 3), torch.zeros(1, dtype=torch.long)).ids
    assert ids[0, 0] == 5


def test_chance_without_noise_is_the_choice_itself() -> None:
    routers = filled()
    c, tasks = torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    gating = routers(c, tasks, chance=True)
    assert torch.equal(gating.chance, torch.zeros(5, 4).scatter(1, gating.ids, 1.0))
    assert routers(c, tasks).chance is None
    every = filled(k=4)(c, tasks, random=StepRandom(0), key="a", chance=True)
    assert torch.equal(every.chance, torch.ones(5, 4))


def test_gates_may_stay_what_they_are_among_all() -> None:
    ids, gates = top_k_softmax(ROWS, 2, renormalize=False)
    assert ids.tolist() == [[2, 1], [3, 0]]
    torch.testing.assert_close(gates, ROWS.softmax(dim=1).gather(1, ids))
    routers = TaskRouters(3, 4, 2, renormalize=False)
    routers.grow()
    fresh = routers(torch.ones(1, 3), torch.zeros(1, dtype=torch.long))
    assert fresh.gates.tolist() == [[0.25, 0.25]]
    routers.widen(6)  # a router that knows four weighs four
    again = routers(torch.ones(1, 3), torch.zeros(1, dtype=torch.long), uniform=0)
    assert torch.equal(again.gates, fresh.gates) and torch.equal(again.ids, fresh.ids)


def test_routers_without_noise_have_none() -> None:
    routers = TaskRouters(3, 4, 2, noise=False)
    routers.grow()
    assert [name for name, _ in routers.named_parameters()] == ["gate.active"]
    routers.gate.active.data.normal_(generator=torch.Generator().manual_seed(0))
    c, tasks = torch.ones(5, 3), torch.zeros(5, dtype=torch.long)
    plain, noisy = routers(c, tasks), routers(c, tasks, random=StepRandom(0), chance=True)
    assert torch.equal(plain.gates, noisy.gates) and torch.equal(plain.ids, noisy.ids)
    assert set(noisy.chance.unique().tolist()) == {0.0, 1.0}
    routers.freeze()
    assert routers.gate.frozen_ids() == [0]
