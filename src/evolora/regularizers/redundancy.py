"""How redundant the ranks of a low-rank update are: measures of weights and of features.

    dW = s B A = s sum_g B_g A_g            (exact, for every partition of the ranks into groups g)
    z_g = A_g x        u_g = B_g z_g        (what a group reads, what it writes)

A measure gives a table (G, G) of pairs of groups: 0 where two have nothing in common, 1 where one
is the other again. For groups of one rank:

    w_cos      cosine(a_i, a_j)^2, of rows of A or of columns of B; needs no data
    f_corr     corr(z_i, z_j)^2 over tokens
    f_contrib  (K_ij / sqrt(K_ii K_jj))^2 with K_ij = E<u_i, u_j>, centred
    f_dist     1 - JS(p_i, p_j) / ln 2: p over tokens where it reads, over outputs where it writes
    f_hsic     linear CKA of z_i and z_j

and for groups of more ranks ||Q_i^T Q_j||_F^2 / size (Q orthonormal), ||C_ij||_F^2 / (||C_ii||_F
||C_jj||_F) (C the correlation, or for CKA the covariance of z), and K summed over blocks. All are
blind to the order of ranks and, but for f_dist, to (c a_k, b_k / c). They are not functions of dW:
(B G^-1, G A) is the same update and another factorisation, and the measure chooses among those.

Two more are numbers, no tables: "w_orth", ||A A^T - I||_F (as AdaLoRA and KaSA have it), and "gor",
group-orthogonal regularisation: the mean over groups of ||G G^T - I||_F^2.

Source: this is "ReSoRA-style". The outline is that of ReSoRA (arXiv 2507.20745): equivalent
subspaces, no redundancy among the features of their projections. Its equations are not known to us;
every measure here is ours or that of the work named: Barlow Twins (2103.03230) for f_corr, GOR
(2306.10001), AdaLoRA (2303.10512), CKA (1905.00414).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evolora.errors import ConfigError

Side = Literal["down", "up"]
Measure = Literal["none", "w_cos", "w_orth", "gor", "f_corr", "f_contrib", "f_dist", "f_hsic"]
DOWN: tuple[Measure, ...] = ("none", "w_cos", "w_orth", "gor", "f_corr", "f_dist", "f_hsic")
UP: tuple[Measure, ...] = ("none", "w_cos", "w_orth", "gor", "f_contrib", "f_dist")
OF_FEATURES: tuple[Measure, ...] = ("f_corr", "f_contrib", "f_dist", "f_hsic")
FLOOR = 1e-3
"""Shorter vectors count as so long: the direction of a vector near zero has no bounded gradient."""
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Factors:
    """One low-rank update.

    Args:
        a: (r, d_in), what it reads.
        b: (d_out, r), what it writes.
        z: (n, r) its bottleneck A x of n real tokens, or None where features are not measured.
    """

    a: Tensor
    b: Tensor
    z: Tensor | None = None


def redundancy(
    measure: Measure, side: Side, factors: Factors, groups: int | None = None
) -> Tensor:
    """Return the redundancy of one side, in float32 (float64 for factors of float64).

    Args:
        measure: see the module docstring.
        side: "down" is A or z, "up" is B or u.
        factors: of the update.
        groups: into how many equal, contiguous parts the ranks fall; None is one rank each.

    Raises:
        ConfigError: groups that do not divide the rank, a measure that the side does not have, or
            one of features where there are none.
    """
    check_measure(measure, side)
    rank = factors.a.shape[0]
    groups = rank if groups is None else groups
    if not 1 <= groups <= rank or rank % groups:
        raise ConfigError(f"groups must divide the rank {rank}; got {groups}")
    if measure in OF_FEATURES and factors.z is None:
        raise ConfigError(f"measure {measure!r} is of features, and none were recorded")
    with torch.autocast(factors.a.device.type, enabled=False):
        exact = _exact(factors)
        rows = exact.a if side == "down" else exact.b.T
        if measure == "none":
            return rows.new_zeros(())
        if measure == "w_orth":
            return torch.linalg.matrix_norm(rows @ rows.T - _eye(rank, rows))
        if measure == "gor":
            return _group_orthogonality(rows, groups)
        if groups == 1:
            return rows.sum() * 0.0
        return mean_of_pairs(pair_table(measure, side, exact, groups))


def pair_table(measure: Measure, side: Side, factors: Factors, groups: int) -> Tensor:
    """Return the table (G, G) of a measure of pairs, see the module docstring."""
    if measure == "w_cos":
        return _cosines(factors.a if side == "down" else factors.b.T, groups)
    assert factors.z is not None
    z = factors.z - factors.z.mean(dim=0)
    if measure == "f_dist":
        return _overlaps(_distributions(side, factors, groups))
    if measure == "f_contrib":
        return _contributions(z, factors.b, groups)
    if measure == "f_corr":
        z = z / _floored(z.pow(2).mean(dim=0).sqrt(), FLOOR * _typical(z))
    return _alignment(z.T @ z / len(z), groups)


def mean_of_pairs(table: Tensor) -> Tensor:
    """Return the mean over pairs of different groups (G at least 2)."""
    count = len(table)
    return (table.sum() - table.diagonal().sum()) / (count * (count - 1))


def check_measure(measure: str, side: Side) -> None:
    """Refuse a measure that a side does not have."""
    allowed = DOWN if side == "down" else UP
    if measure not in allowed:
        raise ConfigError(
            f"measure_{side} must be one of {', '.join(allowed)}; got {measure!r}"
        )


def _exact(factors: Factors) -> Factors:
    """Return the factors in float32 at least."""

    def exact(values: Tensor) -> Tensor:
        return values if values.dtype == torch.float64 else values.float()

    z = None if factors.z is None else exact(factors.z)
    return Factors(exact(factors.a), exact(factors.b), z)


def _cosines(rows: Tensor, groups: int) -> Tensor:
    """Return squared cosines of rows (r, d), or ||Q_i^T Q_j||_F^2 / size of what groups span."""
    if groups == len(rows):
        unit = rows / _floored(torch.linalg.vector_norm(rows, dim=1), FLOOR).unsqueeze(1)
        return (unit @ unit.T).pow(2)
    parts = rows.view(groups, len(rows) // groups, -1)
    gram = torch.einsum("isd,jtd->ijst", parts, parts)  # (G, G, s, s)
    size = parts.shape[1]
    own = gram[torch.arange(groups), torch.arange(groups)] + FLOOR**2 * _eye(size, rows)
    inverse = torch.linalg.inv(own)  # Q_i = (R_i R_i^T)^(-1/2) R_i, so only inverses are needed
    products = torch.einsum("isu,ijut,jtv,ijsv->ij", inverse, gram, inverse, gram)
    return products / size


def _group_orthogonality(rows: Tensor, groups: int) -> Tensor:
    """Return the mean over groups of the squared distance of their Gram matrix from identity."""
    parts = rows.view(groups, len(rows) // groups, -1)
    if parts.shape[1] > parts.shape[2]:  # taller than wide: its columns are to be orthonormal
        parts = parts.transpose(1, 2)
    gram = parts @ parts.transpose(1, 2)
    return (gram - _eye(gram.shape[1], gram)).pow(2).sum(dim=(1, 2)).mean()


def _contributions(z: Tensor, b: Tensor, groups: int) -> Tensor:
    """Return squared cosines of what groups write, from K = Cov(z) * (B^T B): no u is made."""
    kernel = _blocks((z.T @ z / len(z)) * (b.T @ b), groups).sum(dim=(2, 3))
    least = FLOOR**2 * z.detach().pow(2).mean()
    lengths = _floored(kernel.diagonal(), least).sqrt()
    return (kernel / lengths.unsqueeze(0) / lengths.unsqueeze(1)).pow(2)


def _alignment(second: Tensor, groups: int) -> Tensor:
    """Return ||C_ij||_F^2 / (||C_ii||_F ||C_jj||_F) of a matrix (r, r) of second moments."""
    squares = _blocks(second, groups).pow(2).sum(dim=(2, 3))
    norms = _floored(squares.diagonal(), TINY).sqrt()
    return squares / norms.unsqueeze(0) / norms.unsqueeze(1)


def _distributions(side: Side, factors: Factors, groups: int) -> Tensor:
    """Return (G, m) probabilities: over tokens of what a group reads, over what it writes to."""
    assert factors.z is not None
    size = factors.z.shape[1] // groups
    if side == "down":
        return torch.softmax(factors.z.view(-1, groups, size).mean(dim=2).T, dim=1)
    pooled = factors.b * factors.z.mean(dim=0)
    return torch.softmax(pooled.view(-1, groups, size).sum(dim=2).T, dim=1)


def _overlaps(p: Tensor) -> Tensor:
    """Return 1 - JS(p_i, p_j) / ln 2 of distributions (G, m)."""
    middle = (p.unsqueeze(0) + p.unsqueeze(1)) / 2

    def entropy(values: Tensor) -> Tensor:
        return -torch.special.xlogy(values, values.clamp_min(TINY)).sum(dim=-1)

    own = entropy(p)
    divergence = entropy(middle) - (own.unsqueeze(0) + own.unsqueeze(1)) / 2
    return 1.0 - divergence / math.log(2.0)


def _blocks(matrix: Tensor, groups: int) -> Tensor:
    """Return a matrix (r, r) as blocks (G, G, s, s)."""
    size = len(matrix) // groups
    return matrix.view(groups, size, groups, size).transpose(1, 2)


def _floored(values: Tensor, least: float | Tensor) -> Tensor:
    """Return values, none below ``least`` (whose gradient is then zero)."""
    return values.clamp_min(least) if isinstance(least, float) else values.maximum(least)


def _typical(z: Tensor) -> Tensor:
    """Return the largest deviation among columns (n, r), of which no gradient is asked."""
    return z.detach().pow(2).mean(dim=0).max().sqrt().clamp_min(TINY)


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
