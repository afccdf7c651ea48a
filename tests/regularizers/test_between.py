"""What updates have in common with one another and with older ones: by hand, and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evolora.regularizers.between import MEASURES, among, with_older

AXES = torch.eye(6)
PAIR = torch.stack([AXES[:2], 3 * AXES[[1, 0]], AXES[3:5]])
"""The second spans what the first does, the third nothing of theirs."""


def test_subspaces_by_hand() -> None:
    assert float(among("w_cos", PAIR)) == pytest.approx(1 / 3, abs=1e-4)  # one of three pairs
    assert float(among("w_cos", PAIR[:2])) == pytest.approx(1.0, abs=1e-4)
    older = [torch.stack([AXES[[0, 5]]]), torch.stack([AXES[[4, 5]], AXES[2:4]])]
    # Four of nine pairs share one of two directions: twice axis 0, axis 4, axis 3.
    found = float(with_older("w_cos", PAIR, older))
    assert found == pytest.approx(4 * 0.5 / 9, abs=1e-4)
    wide = torch.stack([AXES[:3]])  # of another rank: shares are of the smaller one's
    assert float(with_older("w_cos", PAIR[:1], [wide])) == pytest.approx(1.0, abs=1e-4)


def test_overlaps_by_hand() -> None:
    assert float(among("overlap", PAIR)) == 6.0  # each pair counts once
    older = [torch.stack([AXES[[0, 5]]]), torch.stack([AXES[[4, 5]], -2 * AXES[2:4]])]
    assert float(with_older("overlap", PAIR, older)) == 1.0 + 3.0 + 1.0 + 2.0


@pytest.mark.parametrize("measure", MEASURES[1:])
def test_gradients_are_right(measure: str) -> None:
    draw = torch.Generator().manual_seed(0)
    own = torch.randn(3, 2, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    older = [torch.randn(2, rank, 6, generator=draw, dtype=torch.float64) for rank in (2, 3)]

    def loss(own: Tensor) -> tuple[Tensor, Tensor]:
        return among(measure, own), with_older(measure, own, older)

    assert torch.autograd.gradcheck(loss, (own,))
