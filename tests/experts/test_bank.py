"""GrowingStack and ExpertBank: identifiers keep their rows, bit for bit, through any sequence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank, GrowingStack

grow = st.tuples(st.just("grow"), st.integers(0, 3))
freeze = st.tuples(st.just("freeze"), st.sets(st.integers(0, 20), max_size=6))
drop = st.tuples(st.just("drop"), st.sets(st.integers(0, 20), max_size=3))
widen = st.tuples(st.just("widen"), st.integers(0, 2))
train = st.tuples(st.just("train"), st.just(0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(grow, freeze, drop, widen, train), max_size=12), st.randoms())
def test_rows_keep_their_identifier_through_any_sequence(steps, random) -> None:
    stack = GrowingStack(2, 3)
    draw = torch.Generator().manual_seed(random.randrange(10**6))
    rows: list[torch.Tensor] = []
    frozen: set[int] = set()
    for action, argument in steps:
        width = stack.shape[-1]
        if action == "grow":
            new = torch.randn(argument, 2, width, generator=draw)
            stack.grow(new)
            rows += list(new)
        elif action == "freeze":
            ids = {row for row in argument if row < len(rows)}
            stack.freeze(ids)
            frozen |= ids
        elif action == "drop":
            stack.drop(argument)
            kept = [row for row in range(len(rows)) if row not in argument]
            rows = [rows[row] for row in kept]
            frozen = {place for place, row in enumerate(kept) if row in frozen}
        elif action == "widen":
            stack.widen(width + argument)
            rows = [torch.nn.functional.pad(row, (0, argument)) for row in rows]
        else:  # an optimizer step moves what is not frozen, and nothing else
            with torch.no_grad():
                stack.active.add_(1.0)
            rows = [row if index in frozen else row + 1.0 for index, row in enumerate(rows)]
        assert len(stack) == len(rows)
        assert stack.frozen_ids() == sorted(frozen)
        assert stack.frozen.shape[0] + stack.active.shape[0] == len(rows)
        assert sorted(stack.slot.tolist()) == list(range(len(rows)))
        assert stack.active.requires_grad == (stack.active.numel() > 0)
        assert not stack.frozen.requires_grad
        if rows:
            assert torch.equal(stack.all(), torch.stack(rows))
            order = torch.randperm(len(rows), generator=draw)
            assert torch.equal(stack.take(order), torch.stack(rows)[order])
            pairs = order.repeat(2).view(2, -1)
            assert torch.equal(stack.take(pairs), torch.stack(rows)[pairs])


def test_gradients_reach_trainable_rows_only() -> None:
    stack = GrowingStack(3)
    stack.grow(torch.randn(4, 3))
    stack.freeze([2, 0])
    stack.take(torch.tensor([[0, 1], [2, 1]])).sum().backward()
    assert torch.equal(stack.active.grad, torch.tensor([[2.0] * 3, [0.0] * 3]))  # rows 1 and 3
    assert stack.frozen.grad is None


def test_taking_rows_of_a_mixed_stack_copies_no_other() -> None:
    """A pool of 128 experts, most of them frozen, costs what the taken ones cost."""
    stack = GrowingStack(4, 8)
    stack.grow(torch.randn(128, 4, 8))
    stack.freeze(range(0, 120))
    largest = 0
    known = {rows.untyped_storage().data_ptr() for rows in (stack.frozen, stack.active.detach())}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if out.untyped_storage().data_ptr() not in known:
                largest = max(largest, out.numel())
            return out

    ids = torch.tensor([[5, 127], [121, 5]])
    with Watch(), torch.no_grad():
        taken = stack.take(ids)
    assert torch.equal(taken, stack.all()[ids])
    assert largest <= taken.numel()


def test_parts_known_by_place_are_views_where_they_lie_together() -> None:
    stack = GrowingStack(2)
    rows = torch.randn(6, 2)
    stack.grow(rows)
    stack.freeze([4, 1])  # places: 1, 4 | 0, 2, 3, 5
    places = stack.places()
    assert places == [2, 0, 3, 4, 1, 5]
    whole = stack.part([0, 1])
    assert whole is stack.frozen
    assert stack.part([3, 4]).data_ptr() == stack.active[1].data_ptr()
    scattered = stack.part([2, 5])
    assert torch.equal(scattered, rows[[0, 5]])
    scattered.sum().backward()
    assert torch.equal(stack.active.grad[:, 0], torch.tensor([1.0, 0.0, 0.0, 1.0]))


def test_places_are_read_again_when_they_change() -> None:
    stack = GrowingStack(2)
    stack.grow(torch.randn(3, 2))
    assert stack.places() == [0, 1, 2] and stack.places() is stack.places()
    stack.freeze([2])
    assert stack.places() == [1, 2, 0]
    stack.slot[0], stack.slot[1] = 2, 1  # as load_state_dict does, in place
    assert stack.places() == [2, 1, 0]
    stack.slot = torch.tensor([0, 1, 2])
    assert stack.places() == [0, 1, 2]


def test_rows_may_be_numbers() -> None:
    stack = GrowingStack()
    stack.grow(torch.tensor([1.0, 2.0, 3.0]))
    stack.freeze([1])
    assert stack.take(torch.tensor([[2, 1]])).tolist() == [[3.0, 2.0]]
    assert stack.part([1, 2]).tolist() == [1.0, 3.0]


def test_a_row_cannot_be_frozen_before_it_exists() -> None:
    stack = GrowingStack(3)
    stack.grow(torch.randn(2, 3))
    for wrong in (2, -1):
        with pytest.raises(ConfigError, match=f"row {wrong}: there are 2"):
            stack.freeze([0, wrong])
    assert stack.frozen_ids() == []


def test_rows_only_get_wider() -> None:
    with pytest.raises(ConfigError, match="only grow; got size 2"):
        GrowingStack(3).widen(2)


def test_growing_again_after_freezing_keeps_what_is_frozen_out_of_the_optimizer() -> None:
    bank = ExpertBank(5, 4, 2, bias=True)
    assert bank.grow(2, torch.Generator().manual_seed(0)) == [0, 1]
    bank.freeze([1])
    assert bank.grow(1, torch.Generator().manual_seed(1)) == [2]
    assert len(bank) == 3 and bank.frozen_ids() == [1]
    assert all(stack.active.shape[0] == 2 for stack in bank.stacks())
    assert sum(p.numel() for p in bank.parameters()) == 2 * bank.parameters_per_expert()
    assert bank.parameters_per_expert() == 2 * 5 + 2 * 4 + 2 + 4


def test_new_experts_are_seeded_kaiming_down_and_zero_up() -> None:
    one, same, other = (ExpertBank(64, 8, 32, bias=True) for _ in range(3))
    for bank, seed in ((one, 3), (same, 3), (other, 4)):
        bank.grow(4, torch.Generator().manual_seed(seed))
    assert torch.equal(one.A.active, same.A.active)
    assert not torch.equal(one.A.active, other.A.active)
    bound = 1 / math.sqrt(64)  # Kaiming-uniform with a = sqrt(5)
    assert 0.98 * bound < one.A.active.abs().max() <= bound
    assert float(one.A.active.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    for stack in (one.B, one.down_bias, one.up_bias):
        assert stack.active.abs().max() == 0


@pytest.mark.parametrize("ambient", [False, True])
def test_counting_needs_no_storage(ambient: bool) -> None:
    """Shapes on the meta device, indices real: also where the whole method is built on meta."""
    with torch.device("meta" if ambient else "cpu"):
        bank = ExpertBank(768, 768, 64, bias=True, device="meta")
        bank.grow(22)
        bank.freeze([3, 5])
        bank.grow(1)
    assert bank.frozen_ids() == [3, 5] and len(bank) == 23
    assert bank.A.active.is_meta and not bank.A.slot.is_meta
    assert bank.parameters_per_expert() == 99_136


def test_experts_may_start_normal_as_coins_do() -> None:
    bank = ExpertBank(400, 4, 50)
    bank.grow(2, torch.Generator().manual_seed(0), std=0.01)
    drawn = bank.A.active.detach()
    assert abs(float(drawn.std()) - 0.01) < 2e-4
    assert float(drawn.abs().max()) > 0.03  # further out than a uniform one would reach
    assert not bank.B.active.any()


def test_a_copy_is_frozen_and_stays_what_the_expert_was() -> None:
    bank = ExpertBank(4, 3, 2, bias=True, activation="relu")
    bank.grow(2, torch.Generator().manual_seed(0))
    assert bank.add_copy(1) == 2 and bank.frozen_ids() == [2]
    before = bank.A.all()[1].detach().clone()
    with torch.no_grad():
        bank.A.active.add_(1.0)
    assert torch.equal(bank.A.all()[2], before) and torch.equal(bank.A.all()[1], before + 1.0)
    bank.drop([0])
    assert len(bank) == 2 and bank.frozen_ids() == [1]
    assert torch.equal(bank.A.all(), torch.stack([before + 1.0, before]))
    assert bank.A.active.requires_grad and bank.A.frozen.shape[0] == 1
