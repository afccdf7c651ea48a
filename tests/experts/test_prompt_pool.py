"""Pools of prompt components: golden weights, orthogonal starts, what learns and what does not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from evolora.experts.prompt_pool import PromptPool, component_weights, orthogonal_rows


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_golden_weights() -> None:
    """G10."""
    pool = PromptPool(2, 1, 2)
    pool.grow(2, draw())
    with torch.no_grad():
        pool.keys.active.copy_(torch.tensor([[1.0, 0], [0, 2]]))
        pool.attention.active.copy_(torch.tensor([[1.0, 1], [0, 1]]))
        pool.prompts.active.copy_(torch.tensor([[[1.0, 0]], [[0, 1]]]))
    query = torch.tensor([[3.0, 4.0]])
    weights = component_weights(query, pool.keys.active, pool.attention.active)
    torch.testing.assert_close(weights, torch.tensor([[0.6, 1.0]]))
    torch.testing.assert_close(pool(query), torch.tensor([[[0.6, 1.0]]]))


def test_weights_are_cosines() -> None:
    query, keys, attention = (torch.randn(n, 5, generator=draw(n)) for n in (4, 3, 3))
    expected = F.cosine_similarity(query[:, None] * attention[None], keys[None], dim=2)
    torch.testing.assert_close(component_weights(query, keys, attention), expected)
    assert not component_weights(torch.zeros(1, 5), keys, attention).any()


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_new_rows_are_orthogonal_to_older_ones(shape: tuple[int, ...]) -> None:
    old = torch.randn(4, *shape, generator=draw(1))
    new = orthogonal_rows(old, 5, draw(2))
    assert new.shape == (5, *shape)
    flat = new.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat @ old.flatten(1).T, torch.zeros(5, 4), atol=1e-5, rtol=0)
    full = orthogonal_rows(torch.randn(10, *shape, generator=draw(3)), 5, draw(2))
    torch.testing.assert_close(full.flatten(1).norm(dim=1), torch.ones(5))
    assert orthogonal_rows(old.to("meta"), 5, draw(2)).shape == new.shape


def test_older_components_take_part_and_stay() -> None:
    pool = PromptPool(6, 2, 4)
    pool.grow(2, draw())
    before = [stack.all().detach().clone() for stack in pool.stacks()]
    query = torch.randn(3, 6, generator=draw(4))
    alone = pool(query)
    pool.freeze()
    pool.grow(2, draw(1))
    both = pool(query)
    assert not torch.allclose(both, alone)
    both.square().sum().backward()
    for stack, old in zip(pool.stacks(), before, strict=True):
        assert torch.equal(stack.all()[:2], old) and stack.frozen_ids() == [0, 1]
        assert stack.active.grad is not None and stack.active.grad.flatten(1).any(dim=1).all()


def test_zero_components_never_learn() -> None:
    """The released RebQ: every gradient is zero, of old components and of new ones."""
    pool = PromptPool(6, 2, 4)
    pool.grow(2, draw())
    pool.grow_zeros(3)
    target = torch.randn(4, 2, 4, generator=draw(5))
    (pool(torch.randn(4, 6, generator=draw(4))) - target).square().sum().backward()
    for stack in pool.stacks():
        assert stack.active.shape[0] == 5 and stack.active.grad is not None
        assert not stack.active.grad.any()


def test_orthogonality_is_zero_at_the_start_and_moves_only_new_rows() -> None:
    pool = PromptPool(8, 2, 4)
    pool.grow(2, draw())
    pool.freeze()
    pool.grow(2, draw(1))
    assert pool.orthogonality().item() == pytest.approx(0.0, abs=1e-10)
    with torch.no_grad():
        pool.keys.active.copy_(2 * pool.keys.frozen)
    # K K^T - I is [[0, 2], [2, 3]] in blocks of two: 2 * (4 + 4 + 9) / 16
    assert pool.orthogonality().item() == pytest.approx(34 / 16, abs=1e-5)
