"""How redundant the ranks of a low-rank update are: measures of weights and of features.

    dW = s B A = s sum_g B_g A_g            (exact, for every partition of the ranks into groups g)
    z_g = A_g x        u_g = B_g z_g        (what a group reads, what it writes)

A measure of pairs gives a table (G, G): 0 where two groups have nothing in common, 1 where one is
the other again. For groups of one rank:

    w_cos      cosine(a_i, a_j)^2, of rows of A or of columns of B; needs no data
    f_corr     corr(z_i, z_j)^2 over tokens
    f_contrib  (K_ij / sqrt(K_ii K_jj))^2 with K_ij = E<u_i, u_j>, centred: K = Cov(z) * (B^T B)
    f_dist     1 - JS(p_i, p_j) / ln 2: p over tokens where it reads, over outputs where it writes
    f_hsic     linear CKA of z_i and z_j

and for groups of more ranks ||Q_i^T Q_j||_F^2 / size (Q orthonormal), ||C_ij||_F^2 / (||C_ii||_F
||C_jj||_F) (C the correlation, or for CKA the covariance of z), and K summed over blocks. Of one
group they are 0. All are blind to the order of ranks and, but for f_dist, to (c a_k, b_k / c). They
are not functions of dW: (B G^-1, G A) is the same update and another factorisation, and the measure
chooses among those.

The others are numbers, no tables: "w_orth", ||A A^T - I||_F (as AdaLoRA and KaSA have it), and
"gor" and "gor_intra", group-orthogonal regularisation: the sum over groups of ||W W^T - I||_F^2 (of
W^T W where W is taller than wide), W the rows of a group, or one row of each group. Its groups are
of rows of the weights, A (r, d_in) and B (d_out, r).

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
from evolora.regularizers.features import Features, exact

Side = Literal["down", "up"]
Measure = Literal[
    "none", "w_cos", "w_orth", "gor", "gor_intra", "f_corr", "f_contrib", "f_dist", "f_hsic"
]
DOWN = ("none", "w_cos", "w_orth", "gor", "gor_intra", "f_corr", "f_dist", "f_hsic")
UP = ("none", "w_cos", "w_orth", "gor", "gor_intra", "f_contrib", "f_dist")
OF_FEATURES = ("f_corr", "f_contrib", "f_dist", "f_hsic")
OF_PAIRS = ("w_cos", *OF_FEATURES)
FLOOR = 1e-3
"""Shorter vectors count as so long: the direction of a vector near zero has no bounded gradient."""
GOR_GROUPS, GOR_ROWS = 32, 4
"""Groups of rows that GOR's script makes, and the fewest rows it puts into one."""
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Update:
    """One low-rank update, or several of one shape.

    Args:
        a: (..., r, d_in), rows that it reads.
        b: (..., r, d_out), rows that it writes: the columns of B.
        features: what it makes of tokens; None where features are not measured.
    """

    a: Tensor
    b: Tensor
    features: Features | None = None


def redundancy(
    measure: str, side: Side, update: Update, groups: int | None = None, *, pairwise: bool = False
) -> Tensor:
    """Return the redundancy (...) of one side, in float32 (float64 for factors of float64).

    Args:
        measure: see the module docstring.
        side: "down" is A or z, "up" is B or u.
        update: its factors.
        groups: into how many equal, contiguous parts the ranks fall; None is one rank each. For
            GOR, the rows of the weight; None is its script's 32, of four rows at least.
        pairwise: weigh pairs by the softmax of what they have in common, not all alike.

    Raises:
        ConfigError: groups that do not divide the rank, a measure that the side does not have, or
            one of features where there are none.
    """
    check_measure(measure, side)
    with torch.autocast(update.a.device.type, enabled=False):
        a, b = exact(update.a), exact(update.b)
        rows = a if side == "down" else b
        if measure == "none":
            return rows.new_zeros(rows.shape[:-2])
        if measure in ("gor", "gor_intra"):
            return _group_orthogonality(a if side == "down" else b.mT, groups, measure)
        if measure == "w_orth":
            apart = rows @ rows.mT - _eye(rows.shape[-2], rows)
            distance: Tensor = torch.linalg.matrix_norm(apart)
            return distance
        parts = _checked_groups(groups, rows.shape[-2])
        if measure in OF_FEATURES and update.features is None:
            raise ConfigError(f"measure {measure!r} is of features, and none were recorded")
        if parts == 1:
            return rows.sum(dim=(-2, -1)) * 0.0
        table = pair_table(measure, side, Update(a, b, update.features), parts)
        return mean_of_pairs(table, pairwise=pairwise)


def pair_table(measure: str, side: Side, update: Update, groups: int) -> Tensor:
    """Return the table (..., G, G) of a measure of pairs, see the module docstring."""
    rows = update.a if side == "down" else update.b
    if measure == "w_cos":
        if groups == rows.shape[-2]:
            unit = rows / _floored(torch.linalg.vector_norm(rows, dim=-1), FLOOR).unsqueeze(-1)
            return (unit @ unit.mT).pow(2)
        parts = _split(rows, -2, groups)
        return shared_subspace(parts, parts)
    features = update.features
    assert features is not None
    covariance = features.covariance
    if measure == "f_dist":
        return _overlaps(_distributions(side, features, update.b, groups))
    if measure == "f_contrib":
        return _contributions(covariance, update.b, groups)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    size = rows.shape[-2] // groups
    largest = variance.detach().amax(dim=-1, keepdim=True).clamp_min(TINY)
    if measure == "f_hsic":
        return _alignment(covariance, groups, (FLOOR**2 * largest).pow(2))
    deviation = _floored(variance, FLOOR**2 * largest).sqrt()
    correlation = covariance / deviation.unsqueeze(-1) / deviation.unsqueeze(-2)
    return _alignment(correlation, groups, float(size))


def shared_subspace(mine: Tensor, others: Tensor) -> Tensor:
    """Return ||Q_i^T Q_j||_F^2 / min(s, t) (..., g, h) of what groups span (Q orthonormal).

    Args:
        mine: (..., g, s, d) rows of each group.
        others: (..., h, t, d).
    """
    between = torch.einsum("...isd,...jtd->...ijst", mine, others)
    left, right = _inverse_gram(mine), _inverse_gram(others)
    found = torch.einsum("...isu,...ijut,...jtv,...ijsv->...ij", left, between, right, between)
    return found / min(mine.shape[-2], others.shape[-2])


def mean_of_pairs(table: Tensor, *, pairwise: bool = False) -> Tensor:
    """Return the mean (...) over pairs of different groups of tables (..., G, G), G at least 2.

    Args:
        table: squared likeness of pairs.
        pairwise: the mean weighs by the softmax of the likeness, whose gradient is not taken.
    """
    own = _eye(table.shape[-1], table).bool()
    if pairwise:
        likeness = table.detach().clamp_min(0.0).sqrt().masked_fill(own, -math.inf)
        return (table * likeness.flatten(-2).softmax(dim=-1).view_as(table)).sum(dim=(-2, -1))
    count = table.shape[-1]
    return table.masked_fill(own, 0.0).sum(dim=(-2, -1)) / (count * (count - 1))


def check_measure(measure: str, side: Side) -> None:
    """Refuse a measure that a side does not have."""
    allowed = DOWN if side == "down" else UP
    if measure not in allowed:
        raise ConfigError(f"measure_{side} must be one of {', '.join(allowed)}; got {measure!r}")


def _checked_groups(groups: int | None, rank: int) -> int:
    if groups is None:
        return rank
    if not 1 <= groups <= rank or rank % groups:
        raise ConfigError(f"groups must divide the rank {rank}; got {groups}")
    return groups


def _inverse_gram(parts: Tensor) -> Tensor:
    """Return (R R^T)^-1 of groups (..., g, s, d); directions shorter than FLOOR hardly count."""
    gram = parts @ parts.mT
    size = gram.shape[-1]
    typical = gram.detach().diagonal(dim1=-2, dim2=-1).mean(dim=-1) * 1e-6
    ridge = (typical + FLOOR**2)[..., None, None] * _eye(size, gram)
    inverse: Tensor = torch.linalg.inv(gram + ridge)
    return inverse


def _group_orthogonality(weight: Tensor, groups: int | None, measure: str) -> Tensor:
    """Return the sum over groups of rows of the squared distance of their Gram from identity."""
    rows = weight.shape[-2]
    count = max(1, min(groups or GOR_GROUPS, rows // GOR_ROWS))
    if rows % count:
        raise ConfigError(f"gor: {count} groups must divide the {rows} rows of a weight")
    parts = _split(weight, -2, count)
    if measure == "gor_intra" and rows > count:
        parts = parts.transpose(-3, -2)  # one row of each group
    if parts.shape[-2] >= parts.shape[-1]:  # taller than wide: its columns are to be orthonormal
        parts = parts.mT
    gram = parts @ parts.mT
    return (gram - _eye(gram.shape[-1], gram)).pow(2).sum(dim=(-3, -2, -1))


def _contributions(covariance: Tensor, b: Tensor, groups: int) -> Tensor:
    """Return squared cosines of what groups write, from K = Cov(z) * (B^T B): no u is made."""
    kernel = _blocks(covariance * (b @ b.mT), groups).sum(dim=(-2, -1))
    typical = covariance.detach().diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True)
    lengths = _floored(_diagonal(kernel), (FLOOR**2 * typical).clamp_min(TINY**2)).sqrt()
    return (kernel / lengths.unsqueeze(-1) / lengths.unsqueeze(-2)).pow(2)


def _alignment(second: Tensor, groups: int, least: float | Tensor) -> Tensor:
    """Return ||C_ij||_F^2 / (||C_ii||_F ||C_jj||_F) of second moments (..., r, r).

    Args:
        second: correlation or covariance.
        groups: of ranks.
        least: the smallest ||C_ii||_F^2 that counts.
    """
    squares = _blocks(second, groups).pow(2).sum(dim=(-2, -1))
    norms = _floored(_diagonal(squares), least).sqrt()
    return squares / norms.unsqueeze(-1) / norms.unsqueeze(-2)


def _distributions(side: Side, features: Features, b: Tensor, groups: int) -> Tensor:
    """Return (..., G, m) probabilities: over tokens of what a group reads, or what it writes to."""
    if side == "up":
        pooled = b * features.mean.unsqueeze(-1)
        return _split(pooled, -2, groups).sum(dim=-2).softmax(dim=-1)
    assert features.tokens is not None
    read = _split(features.tokens, -1, groups).mean(dim=-1).mT
    if features.real is not None:
        none = ~features.real.any(dim=-1, keepdim=True)  # of no token at all: any distribution
        read = read.masked_fill(~(features.real | none).unsqueeze(-2), -math.inf)
    return read.softmax(dim=-1)


def _overlaps(p: Tensor) -> Tensor:
    """Return 1 - JS(p_i, p_j) / ln 2 of distributions (..., G, m)."""

    def entropy(values: Tensor) -> Tensor:
        return -(values * values.clamp_min(TINY).log()).sum(dim=-1)

    own = entropy(p)
    middle = entropy((p.unsqueeze(-3) + p.unsqueeze(-2)) / 2)
    divergence = middle - (own.unsqueeze(-1) + own.unsqueeze(-2)) / 2
    return 1.0 - divergence / math.log(2.0)


def _blocks(matrix: Tensor, groups: int) -> Tensor:
    """Return matrices (..., r, r) as blocks (..., G, G, s, s)."""
    return _split(_split(matrix, -1, groups), -3, groups).transpose(-3, -2)


def _split(values: Tensor, dim: int, groups: int) -> Tensor:
    """Return values with an axis (counted from the end) as two: (groups, its size / groups)."""
    place = values.dim() + dim
    return values.reshape(*values.shape[:place], groups, -1, *values.shape[place + 1 :])


def _diagonal(table: Tensor) -> Tensor:
    return table.diagonal(dim1=-2, dim2=-1)


def _floored(values: Tensor, least: float | Tensor) -> Tensor:
    """Return values, none below ``least`` (whose gradient is then zero)."""
    return values.clamp_min(least) if isinstance(least, float) else values.maximum(least)


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
