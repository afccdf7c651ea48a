"""Orthogonal subspaces: what a new low-rank expert reads lies across what older ones read.

    overlap = sum_ij |(A_old A_new^T)_ij|

It is zero where every row of A_new is orthogonal to every row of A_old: then the new expert changes
nothing for inputs in the span of the old rows.

Source: Wang et al., Findings of EMNLP 2023, arXiv 2310.14152; absolute entries as in its released
code. Rows are not brought to unit length, so the term also holds them short.
"""

from __future__ import annotations

from torch import Tensor


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """Return the sum of |a_i . a_j| over all rows a_i of ``old`` and a_j of ``new``.

    Args:
        old: (e, r, d) or (r, d); no gradient is needed.
        new: likewise, of the same width d.
    """
    return (old.flatten(0, -2) @ new.flatten(0, -2).T).abs().sum()
