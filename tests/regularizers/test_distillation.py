"""The divergence from a teacher's answers, by hand and by its properties."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from evolora.regularizers.distillation import distillation


def test_two_classes_by_hand() -> None:
    """At T = 2 logits 2 ln 3 and 0 are chances 3/4 and 1/4; the other one has 1/2 each."""
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]])
    found = distillation(torch.zeros(1, 2), teacher, temperature=2.0)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.tolist() == pytest.approx([expected])
    # with several labels each class is a coin: 3/4 against 1/2, and 1/2 against 1/2
    coins = distillation(torch.zeros(1, 2), teacher, temperature=2.0, several=True)
    assert coins.tolist() == pytest.approx([expected])


@pytest.mark.parametrize("several", [False, True])
def test_it_is_zero_at_the_teacher_and_positive_elsewhere(several: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(4, 3, 5, generator=draw) * 3 for _ in range(2))
    assert distillation(logits, teacher, several=several).shape == (4, 3)
    assert (distillation(logits, teacher, several=several) > 0).all()
    same = distillation(teacher, teacher, several=several)
    torch.testing.assert_close(same, torch.zeros(4, 3), atol=1e-6, rtol=0)
    far = distillation(logits * 1e3, teacher * 1e3, several=several)
    assert far.isfinite().all(), "chances of zero have a limit"


def test_its_gradient_is_that_of_cross_entropy_against_the_teacher() -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, generator=draw, requires_grad=True)
    teacher = torch.randn(3, 4, generator=draw, requires_grad=True)
    (own,) = torch.autograd.grad(distillation(logits, teacher, temperature=3.0).sum(), logits)
    target = (teacher.detach() / 3.0).softmax(dim=1)
    other = F.cross_entropy(logits / 3.0, target, reduction="sum")
    torch.testing.assert_close(own, torch.autograd.grad(other, logits)[0])
    assert teacher.grad is None
