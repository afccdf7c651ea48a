"""Adversarial discrimination: reversed gradients, and a softmax taken once and twice."""

from __future__ import annotations

import pytest
import torch

from evolora.regularizers.adversarial import discriminator_losses, reverse_gradient


def test_a_reversed_gradient_leaves_the_value_and_turns_the_slope() -> None:
    x = torch.tensor([2.0, -1.0], requires_grad=True)
    out = reverse_gradient(x, 0.5)
    assert torch.equal(out, x)
    (out * torch.tensor([3.0, 4.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [-1.5, -2.0]


def test_two_softmaxes_flatten_the_loss() -> None:
    logits, first = torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([0])
    once = discriminator_losses(logits, first)
    twice = discriminator_losses(logits, first, "probabilities")
    assert once.tolist() == pytest.approx([0.3408], abs=5e-5)
    assert twice.tolist() == pytest.approx([0.9639], abs=5e-5)


def test_two_softmaxes_of_four_tasks_stay_in_a_narrow_range() -> None:
    sure = torch.tensor([[60.0, 0, 0, 0], [0, 60.0, 0, 0]])
    task = torch.tensor([0, 0])
    assert discriminator_losses(sure, task, "probabilities").tolist() == pytest.approx(
        [0.7437, 1.7437], abs=5e-5
    )
    assert discriminator_losses(sure, task).tolist() == pytest.approx([0.0, 60.0], abs=1e-4)
    draws = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * 20
    some = discriminator_losses(draws, torch.zeros(500, dtype=torch.long), "probabilities")
    assert float(some.min()) > 0.7436 and float(some.max()) < 1.7438


def test_the_gradient_of_two_softmaxes_is_weaker() -> None:
    slopes = []
    for given in ("logits", "probabilities"):
        logits = torch.tensor([[-2.0, 1.0, 0.5, 0.0]], requires_grad=True)
        discriminator_losses(logits, torch.tensor([0]), given).sum().backward()  # type: ignore[arg-type]
        assert logits.grad is not None
        slopes.append(float(logits.grad.norm()))
    assert slopes[1] < 0.2 * slopes[0]
