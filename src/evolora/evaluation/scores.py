"""Macro-F1 of a test set whose samples may have several labels.

Macro-F1, stated once: a label is predicted where its probability is above the threshold (0.5, so a
probability of exactly 0.5 is a no); F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c) over all samples; the
score is the plain mean over the columns asked for, where a label that no sample has and none is
given counts 0. CMML papers take the columns of every class seen so far, so that the score falls as
tasks are added, whatever is learned; over the columns of the samples' own task it does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolora.errors import DataError

THRESHOLD = 0.5
Counts = NDArray[np.int64]


def label_counts(
    probabilities: ArrayLike, labels: ArrayLike, *, threshold: float = THRESHOLD
) -> Counts:
    """Return (3, c) counts per label: right, wrongly given, missed. They add up over batches.

    Arguments and errors are those of `label_marks`.
    """
    counts: Counts = label_marks(probabilities, labels, threshold=threshold).sum(axis=0)
    return counts


def label_marks(
    probabilities: ArrayLike, labels: ArrayLike, *, threshold: float = THRESHOLD
) -> Counts:
    """Return (b, 3, c) of 0 and 1: what each sample adds to `label_counts`.

    Args:
        probabilities: (b, c) in [0, 1], not logits.
        labels: (b, c) of 0 and 1.
        threshold: a label is given above it.

    Raises:
        DataError: shapes differ, or values are no probabilities or no labels.
    """
    given = np.asarray(probabilities, dtype=np.float64)
    truth = np.asarray(labels, dtype=np.float64)
    if given.ndim != 2 or given.shape != truth.shape:
        raise DataError(
            f"probabilities and labels must both be (samples, classes); got {given.shape} and "
            f"{truth.shape}"
        )
    if not ((given >= 0) & (given <= 1)).all():
        raise DataError("macro-F1 needs probabilities in [0, 1]; apply a sigmoid to logits")
    if not np.isin(truth, (0, 1)).all():
        raise DataError("labels must be 0 or 1")
    predicted, true = given > threshold, truth == 1
    marks = np.stack([predicted & true, predicted & ~true, ~predicted & true], axis=1)
    return marks.astype(np.int64)


def macro_f1_of_counts(counts: ArrayLike, columns: Sequence[int] | None = None) -> float:
    """Return the macro-F1 of what `label_counts` counted.

    Args:
        counts: (3, c), summed over batches.
        columns: labels to average over; None for all. Every class seen so far gives the papers'
            score; the classes of the samples' own task the one that is not diluted.

    Raises:
        DataError: no column, or one that is not there.
    """
    table = np.asarray(counts, dtype=np.float64)
    chosen = range(table.shape[1]) if columns is None else columns
    if not len(chosen) or min(chosen) < 0 or max(chosen) >= table.shape[1]:
        raise DataError(f"columns must be some of 0 to {table.shape[1] - 1}; got {list(chosen)}")
    right, wrong, missed = table[:, list(chosen)]
    whole = 2 * right + wrong + missed
    return float(np.mean(np.where(whole > 0, 2 * right / np.maximum(whole, 1), 0.0)))


def macro_f1(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    columns: Sequence[int] | None = None,
    threshold: float = THRESHOLD,
) -> float:
    """Return the macro-F1 of a test set; arguments of `label_counts` and `macro_f1_of_counts`."""
    return macro_f1_of_counts(label_counts(probabilities, labels, threshold=threshold), columns)
