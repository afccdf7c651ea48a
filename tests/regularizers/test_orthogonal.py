"""The overlap of subspaces, by hand."""

from __future__ import annotations

import torch

from evolora.regularizers.orthogonal import overlap


def test_it_sums_absolute_products_of_rows() -> None:
    old = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]])
    new = torch.tensor([[3.0, -1.0, 0.0], [0.0, 0.0, 2.0]])
    # [[1*3 - 2, 0], [1, 2]]
    assert float(overlap(old, new)) == 4.0
    assert float(overlap(old, -new)) == 4.0 == float(overlap(new, old))


def test_several_older_experts_are_all_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    old, new = (torch.randn(count, 2, 5, generator=draw) for count in (3, 1))
    expected = sum(overlap(one, new[0]) for one in old)
    torch.testing.assert_close(overlap(old, new), torch.as_tensor(expected))


def test_it_vanishes_across_and_its_gradient_leads_there() -> None:
    old = torch.tensor([[1.0, 0.0, 0.0]])
    across = torch.tensor([[0.0, 4.0, -2.0]])
    assert float(overlap(old, across)) == 0.0
    new = torch.tensor([[0.5, 1.0, 1.0]], requires_grad=True)
    overlap(old, new).backward()
    assert new.grad is not None and new.grad.tolist() == [[1.0, 0.0, 0.0]]
