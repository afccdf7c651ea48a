"""Macro-F1 by its stated rule, and scores by what a sample lacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evolora.errors import DataError
from evolora.evaluation.scores import (
    label_counts,
    macro_f1,
    macro_f1_of_counts,
)

LOGITS = torch.tensor([[2.0, -1.0, 0.0, 0.0], [-1.0, 3.0, 0.0, 0.0]])
LABELS = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]])


def test_g8_seen_labels_dilute_and_own_labels_do_not() -> None:
    assert macro_f1(LOGITS.sigmoid(), LABELS) == pytest.approx(0.5)
    assert macro_f1(LOGITS.sigmoid(), LABELS, columns=[0, 1]) == pytest.approx(1.0)
    assert macro_f1(LOGITS.sigmoid(), LABELS, columns=range(2, 4)) == 0.0


def test_f1_of_one_label_is_the_sum_done_on_paper() -> None:
    # label 0: 2 right, 1 wrong, 1 missed -> 4 / 6; label 1: 1 right, 0 wrong, 2 missed -> 2 / 4
    given_ = [[0.9, 0.1], [0.8, 0.7], [0.6, 0.5], [0.2, 0.3]]
    truth = [[1, 0], [1, 1], [0, 1], [1, 1]]
    assert label_counts(given_, truth).tolist() == [[2, 1], [1, 0], [1, 2]]
    assert macro_f1(given_, truth) == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert macro_f1(given_, truth, threshold=0.45) == pytest.approx((4 / 6 + 4 / 5) / 2)


tables = st.tuples(st.integers(1, 8), st.integers(1, 5)).flatmap(
    lambda shape: st.tuples(
        arrays(np.float64, shape, elements=st.floats(0, 1)),
        arrays(np.int64, shape, elements=st.integers(0, 1)),
    )
)


@given(tables, st.integers(0, 8))
def test_counts_add_up_over_batches(table: tuple[np.ndarray, np.ndarray], cut: int) -> None:
    given_, truth = table
    parts = label_counts(given_[:cut], truth[:cut]) + label_counts(given_[cut:], truth[cut:])
    assert macro_f1_of_counts(parts) == macro_f1(given_, truth)
    assert 0 <= macro_f1(given_, truth) <= 1


@given(tables)
def test_the_truth_scores_one_on_labels_that_are_there(
    table: tuple[np.ndarray, np.ndarray],
) -> None:
    truth = table[1]
    there = np.flatnonzero(truth.any(0)).tolist()
    assert macro_f1(truth, truth) == pytest.approx(len(there) / truth.shape[1])
    if there:
        assert macro_f1(truth, truth, columns=there) == 1.0
        assert macro_f1(1 - truth, truth, columns=there) == 0.0


def test_what_is_no_probability_or_label_is_refused() -> None:
    with pytest.raises(DataError, match="apply a sigmoid to logits"):
        macro_f1(LOGITS, LABELS)
    with pytest.raises(DataError, match=r"needs probabilities"):
        macro_f1([[float("nan")]], [[1]])
    with pytest.raises(DataError, match="labels must be 0 or 1"):
        macro_f1([[0.5]], [[2]])
    with pytest.raises(DataError, match=r"got \(2, 4\) and \(2, 3\)"):
        macro_f1(LOGITS.sigmoid(), LABELS[:, :3])
    for columns in ([], [4], [-1]):
        with pytest.raises(DataError, match="columns must be some of 0 to 3"):
            macro_f1(LOGITS.sigmoid(), LABELS, columns=columns)
