"""What several low-rank updates of one layer have in common: among themselves, and with older ones.

"w_cos" is the mean over pairs of updates of ||Q_i^T Q_j||_F^2 / rank, the shared part of the
subspaces that they read (rows of A) or write (columns of B). "overlap" is O-LoRA's: the sum of
|a_i . a_j| over all rows of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evolora.regularizers.orthogonal import overlap
from evolora.regularizers.redundancy import shared_subspace

MEASURES = ("none", "w_cos", "overlap")


def among(measure: str, own: Tensor) -> Tensor:
    """Return what updates (e, r, d) have in common, e at least 2."""
    if measure == "overlap":
        parts = [overlap(own[:index], own[index]) for index in range(1, len(own))]
        return torch.stack(parts).sum()
    table = shared_subspace(own, own)
    return (table.sum() - table.diagonal().sum()) / (len(own) * (len(own) - 1))


def with_older(measure: str, own: Tensor, older: Sequence[Tensor]) -> Tensor:
    """Return what updates (e, r, d) have in common with older ones (f, r', d), at least one."""
    if measure == "overlap":
        return torch.stack([overlap(part, own) for part in older]).sum()
    return torch.cat([shared_subspace(own, part) for part in older], dim=1).mean()
