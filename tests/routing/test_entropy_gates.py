"""Entropy-driven gates: the golden numbers of Tsallis entropy and of the choice of experts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evolora.routing.entropy_gates import (
    entropy_gates,
    masked_mean,
    top_k_balance,
    top_p_gates,
    tsallis_entropy,
)

EIGHT = (0.5, 0.3, 0.1, 0.05, 0.05, 0.0, 0.0, 0.0)
GOLDEN = [
    ((0.25,) * 4, (1.386294, 1.294494, 1.0, 0.75)),
    ((0.7, 0.1, 0.1, 0.1), (0.940448, 0.862288, 0.638939, 0.48)),
    ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
    ((0.125,) * 8, (2.079442, 1.877476, 1.292893, 0.875)),
    (EIGHT, (1.237597, 1.139668, 0.856293, 0.645)),
]


def dynamic(row: tuple[float, ...], q: float = 1.1) -> Tensor:
    p = torch.tensor([row])
    return entropy_gates(p, tsallis_entropy(p, q), threshold=0.9, mass=0.75, least=2)[0]


@pytest.mark.parametrize(("row", "wanted"), GOLDEN)
def test_entropy_has_the_golden_values(row: tuple[float, ...], wanted: tuple[float, ...]) -> None:
    for q, value in zip((1.0, 1.1, 1.5, 2.0), wanted, strict=True):
        assert float(tsallis_entropy(torch.tensor(row), q)) == pytest.approx(value, abs=2e-6)


def test_entropy_is_smooth_where_it_becomes_shannons() -> None:
    p = torch.tensor([0.7, 0.1, 0.1, 0.1], requires_grad=True)
    shannon = tsallis_entropy(p, 1.0)
    (slope,) = torch.autograd.grad(shannon, p)
    assert float(shannon.detach()) == pytest.approx(-sum(x * math.log(x) for x in p.tolist()))
    for q in (1 - 1e-4, 1 - 1e-7, 1 + 1e-12, 1 + 1e-7, 1 + 1e-4):
        near = tsallis_entropy(p, q)
        (near_slope,) = torch.autograd.grad(near, p)
        assert float(near.detach()) == pytest.approx(float(shannon.detach()), abs=2e-4)
        torch.testing.assert_close(near_slope, slope, rtol=0, atol=2e-3)
    sure = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    for q in (0.3, 1.0, 1.1, 2.0):
        (found,) = torch.autograd.grad(tsallis_entropy(sure, q), sure)
        assert bool(found.isfinite().all())


def test_the_largest_entropy_is_that_of_even_experts() -> None:
    draws = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).softmax(1)
    largest = (1 - 8**-0.1) / 0.1
    assert largest == pytest.approx(1.877476, abs=1e-6)
    assert float(tsallis_entropy(draws, 1.1).max()) < largest


def test_a_sure_token_asks_few_and_an_unsure_one_all() -> None:
    assert dynamic((0.7, 0.1, 0.1, 0.1)).tolist() == pytest.approx([0.875, 0.125, 0, 0])
    assert torch.equal(dynamic(EIGHT), torch.tensor(EIGHT))  # S = 1.14 > 0.9: every p as it is
    assert dynamic((0.0, 1.0, 0.0, 0.0)).tolist() == [0.0, 1.0, 0.0, 0.0]  # the second weighs 0


def test_entropy_at_the_threshold_is_sparse() -> None:
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    entropy = tsallis_entropy(p, 2.0)
    at = entropy_gates(p, entropy, threshold=float(entropy), mass=0.5, least=1)
    below = entropy_gates(p, entropy, threshold=float(entropy) - 1e-6, mass=0.5, least=1)
    torch.testing.assert_close(at, torch.tensor([[4 / 7, 3 / 7, 0, 0]]))
    assert torch.equal(below, p)


@pytest.mark.parametrize(
    ("row", "mass", "least", "wanted"),
    [
        # kept weights sum to 1 again; MoE-PEFT's "mixlora-dynamic" leaves them at .5 and .3
        ((0.5, 0.3, 0.1, 0.1), 0.75, 1, (0.625, 0.375, 0, 0)),
        ((0.1, 0.3, 0.1, 0.5), 0.75, 1, (0, 0.375, 0, 0.625)),  # in any order of the experts
        ((0.5, 0.25, 0.125, 0.125), 0.75, 1, (2 / 3, 1 / 3, 0, 0)),  # reached exactly: no more
        ((0.5, 0.25, 0.125, 0.125), 0.7501, 1, (4 / 7, 2 / 7, 1 / 7, 0)),  # a tie: the first
        ((0.9, 0.05, 0.05, 0.0), 0.75, 1, (1, 0, 0, 0)),
        ((0.9, 0.05, 0.05, 0.0), 0.75, 3, (0.9, 0.05, 0.05, 0)),
        ((0.25, 0.25, 0.25, 0.25), 1.0, 1, (0.25, 0.25, 0.25, 0.25)),
    ],
)
def test_the_smallest_prefix_that_reaches_the_mass_is_kept(
    row: tuple[float, ...], mass: float, least: int, wanted: tuple[float, ...]
) -> None:
    gates = top_p_gates(torch.tensor(row), mass, least)
    assert gates.tolist() == pytest.approx(list(wanted), abs=1e-6)
    assert float(gates.sum()) == pytest.approx(1.0)


def test_every_token_decides_alone_and_gates_carry_gradient() -> None:
    p = torch.tensor([[EIGHT, (0.9, 0.1, 0, 0, 0, 0, 0, 0)]], requires_grad=True)
    entropy = tsallis_entropy(p, 1.1)
    gates = entropy_gates(p, entropy, threshold=0.9, mass=0.75, least=2)
    assert gates.shape == (1, 2, 8)
    assert torch.equal(gates[0, 0], p[0, 0]) and torch.equal(gates[0, 1, :2], p[0, 1, :2])
    gates[0, 1, 0].backward()
    assert p.grad is not None
    assert p.grad[0, 1].tolist() == pytest.approx([0.1, -0.9, 0, 0, 0, 0, 0, 0], abs=1e-6)


def test_balance_is_one_for_even_use_and_the_number_of_experts_for_one_of_one() -> None:
    rolled = torch.stack([torch.tensor([0.4, 0.3, 0.2, 0.1]).roll(i) for i in range(4)])
    assert float(top_k_balance(rolled, 2)) == pytest.approx(1.0)
    alone = torch.eye(4)[:1].expand(5, 4)
    assert float(top_k_balance(alone, 1)) == pytest.approx(4.0)
    # two of four always: f = (1/2, 1/2, 0, 0), P = (.6, .4, 0, 0)
    two = torch.tensor([[0.6, 0.4, 0.0, 0.0]]).expand(3, 4)
    assert float(top_k_balance(two, 2)) == pytest.approx(2.0)


def test_padding_does_not_count() -> None:
    p = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)).softmax(-1)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    other = torch.where(real.unsqueeze(-1), p, torch.tensor([1.0, 0, 0, 0]))
    assert torch.equal(top_k_balance(p, 2, real), top_k_balance(other, 2, real))
    assert not torch.equal(top_k_balance(p, 2), top_k_balance(other, 2))
    torch.testing.assert_close(top_k_balance(p, 2, real), top_k_balance(p[real], 2))
    entropies = [tsallis_entropy(each, 1.1) for each in (p, other)]
    assert torch.equal(masked_mean(entropies[0], real), masked_mean(entropies[1], real))
    torch.testing.assert_close(masked_mean(entropies[0], real), entropies[0][real].mean())
    nobody = torch.zeros_like(real)
    assert float(top_k_balance(p, 2, nobody)) == float(masked_mean(entropies[0], nobody)) == 0.0
