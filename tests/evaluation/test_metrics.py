"""Metrics against hand-computed cases, the benchmark authors' own matrices, and properties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evolora.errors import DataError
from evolora.evaluation import metrics
from evolora.evaluation.matrix import Matrix, read_matrix

DATA = Path(__file__).parent / "data"
HAND = np.array([[0.80, 0.50, 0.20], [0.60, 0.90, 0.40], [0.40, 0.70, 1.00]])
ZERO_SHOT = [24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2]


def matrix_of(values, baseline=None):
    return Matrix(
        tasks=tuple(f"t{j}" for j in range(len(values))),
        values=np.asarray(values),
        counts=np.ones(len(values), dtype=int),
        baseline=baseline,
    )


squares = st.integers(1, 6).flatmap(
    lambda size: arrays(np.float64, (size, size), elements=st.floats(0, 1))
)
larger_squares = st.integers(2, 6).flatmap(
    lambda size: arrays(np.float64, (size, size), elements=st.floats(0, 1))
)


def test_every_metric_of_a_hand_made_matrix_equals_the_sum_done_on_paper():
    # Transfer: column 1 -> 0.5, column 2 -> (0.2 + 0.4) / 2 = 0.3; mean 0.4
    assert metrics.transfer_per_task(HAND) == (None, 0.5, pytest.approx(0.3))
    assert metrics.transfer_zscl(HAND) == pytest.approx(0.4)
    assert metrics.avg_per_task(HAND) == pytest.approx((0.6, 0.7, 1.6 / 3))
    assert metrics.avg_zscl(HAND) == pytest.approx(5.5 / 9)
    assert metrics.last_per_task(HAND) == pytest.approx((0.4, 0.7, 1.0))
    assert metrics.last(HAND) == pytest.approx(0.7)
    assert metrics.average_accuracy(HAND) == pytest.approx(0.7)
    # steps: 0.8, (0.6 + 0.9) / 2 = 0.75, 0.7
    assert metrics.average_incremental_accuracy(HAND) == pytest.approx(0.75)
    # BWT: ((0.4 - 0.8) + (0.7 - 0.9)) / 2
    assert metrics.bwt_lopezpaz(HAND) == pytest.approx(-0.3)
    # FWT: ((0.5 - 0.3) + (0.4 - 0.1)) / 2
    assert metrics.fwt_lopezpaz(HAND, [0.7, 0.3, 0.1]) == pytest.approx(0.25)
    # forgetting: (max(0.8, 0.6) - 0.4 + 0.9 - 0.7) / 2
    assert metrics.forgetting_per_task(HAND) == (pytest.approx(0.4), pytest.approx(0.2), None)
    assert metrics.forgetting_chaudhry(HAND) == pytest.approx(0.3)


def test_the_golden_matrix_of_continual_instruction_tuning():
    """A.6 of the specification of D-MoLE: AVG has two readings, BWT two divisors, MAA is CoIN's."""
    golden = np.array([[80, 50, 30], [70, 90, 40], [60, 85, 95]]) / 100
    result = metrics.summary(matrix_of(golden))
    assert result["last"] == pytest.approx(0.80)
    assert result["bwt"] == pytest.approx(-0.125)
    assert result["bwt_over_all"] == pytest.approx(-0.25 / 3)  # -8.333
    assert result["average_incremental_accuracy"] == pytest.approx(0.80)  # MAA
    assert result["avg"] == pytest.approx(2 / 3)  # avg_all
    assert metrics.avg_seen_per_task(golden) == pytest.approx((0.70, 0.875, 0.95))
    assert result["avg_seen"] == pytest.approx(0.84167, abs=5e-6)


@given(squares)
def test_avg_over_seen_stages_looks_at_nothing_above_the_diagonal(values):
    changed = values.copy()
    changed[np.triu_indices(len(values), 1)] = np.nan
    assert metrics.avg_seen(changed) == metrics.avg_seen(values)


def test_the_golden_matrix_of_continual_learning_of_modalities():
    """9.2 of the specification of PathWeave: column 0 is what the base model knows."""
    golden = np.array([[60, np.nan, np.nan], [58, 40, np.nan], [54, 39, 30]]) / 100
    assert metrics.new_modalities(golden) == pytest.approx((0.40, 0.30))
    assert metrics.forgetting_of_stages(golden) == pytest.approx((0.02, 0.035))
    relative = metrics.forgetting_of_stages(golden, relative=True)
    assert relative == pytest.approx((2 / 60, 0.0625))
    result = metrics.summary(matrix_of(golden))
    assert result["mcl_t"] == pytest.approx(0.35)
    assert result["mcl_f"] == pytest.approx(0.0275)
    assert result["mcl_f_relative"] == pytest.approx((2 / 60 + 0.0625) / 2)
    nothing = np.array([[0.0, 0.5], [0.0, 0.5]])
    assert metrics.forgetting_of_stages(nothing, relative=True) == (None,)


def test_weights_by_samples_give_the_accuracy_over_all_samples():
    # 10, 30, 60 samples: step 2 is (0.6 * 10 + 0.9 * 30) / 40 = 0.825; step 3 is 0.85
    counts = [10, 30, 60]
    assert metrics.average_accuracy(HAND, counts) == pytest.approx(0.85)
    expected = (0.8 + 0.825 + 0.85) / 3
    assert metrics.average_incremental_accuracy(HAND, counts) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "transfer", "avg", "last", "flat"),
    [
        ("zscl_t3_1", 44.56, 55.85, 77.27, 43.00),  # continual fine-tuning
        ("zscl_t3_2", 56.90, 64.70, 74.64, None),  # LwF
        ("zscl_t3_7", 68.14, 75.39, 83.62, 68.46),  # ZSCL
    ],
)
def test_published_matrices_give_the_published_numbers(name, transfer, avg, last, flat):
    """Order I of MTIL, matrices printed in Thunderbeee/ZSCL, mtil/results.ipynb."""
    values = read_matrix(DATA / f"{name}.csv").values
    assert values.shape == (11, 11)
    assert 100 * metrics.transfer_zscl(values) == pytest.approx(transfer, abs=0.005)
    assert 100 * metrics.avg_zscl(values) == pytest.approx(avg, abs=0.005)
    assert 100 * metrics.last(values) == pytest.approx(last, abs=0.006)  # 74.636 is cut at 74.64
    if flat is not None:
        upper = values[np.triu_indices(11, 1)].mean()
        assert 100 * upper == pytest.approx(flat, abs=0.005)
        assert abs(upper - metrics.transfer_zscl(values)) > 0.003


def test_per_task_vectors_equal_the_published_rows_of_zscl():
    values = read_matrix(DATA / "zscl_t3_7.csv").values
    transfer = [100 * x for x in metrics.transfer_per_task(values)[1:]]
    assert transfer == pytest.approx(
        [86.0, 67.4, 45.4, 50.4, 69.1, 87.6, 61.8, 86.8, 60.1, 66.8], abs=0.05
    )
    last = [100 * x for x in metrics.last_per_task(values)]
    assert last == pytest.approx(
        [40.6, 92.2, 81.3, 70.5, 94.8, 90.5, 91.9, 98.7, 93.9, 85.3, 80.2], abs=0.05
    )


def test_frozen_zero_shot_has_the_published_transfer_in_both_orders():
    order_two = [9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2]
    scores = np.array(ZERO_SHOT) / 100
    for order, transfer in ((range(11), 69.4), (order_two, 65.4)):
        values = np.tile(scores[list(order)], (11, 1))
        assert 100 * metrics.transfer_zscl(values) == pytest.approx(transfer, abs=0.051)
        assert 100 * metrics.avg_zscl(values) == pytest.approx(65.3, abs=0.05)
        assert 100 * metrics.last(values) == pytest.approx(65.3, abs=0.05)


@given(larger_squares)
def test_leaving_unseen_tasks_to_the_base_keeps_the_zero_shot_transfer(values):
    baseline = values[0].copy()
    rows, columns = np.triu_indices(len(values), 1)
    values[rows, columns] = baseline[columns]
    result = metrics.summary(matrix_of(values, baseline))
    assert result["transfer"] == pytest.approx(result["zero_shot_transfer"])
    assert result["fwt"] == pytest.approx(0.0)


def test_g7_metrics_of_continual_missing_modality_learning():
    unseen = np.array([[0.90, np.nan, np.nan], [0.80, 0.85, np.nan], [0.70, 0.75, 0.95]])
    result = metrics.summary(matrix_of(unseen))
    assert result["cmml_ap"] == pytest.approx(0.80) == result["last"]
    assert result["cmml_fg"] == pytest.approx(0.15) == -result["bwt"]
    assert result["cmml_last"] == pytest.approx(0.95)


@given(larger_squares)
def test_cmml_s_forgetting_looks_at_the_diagonal_alone(values):
    changed = values.copy()
    changed[np.tril_indices(len(values) - 1, -1)] = 1.0  # between learning and the last row
    assert metrics.fg_cmml(changed) == pytest.approx(metrics.fg_cmml(values))
    assert metrics.forgetting_chaudhry(values) >= metrics.fg_cmml(values) - 1e-12


@given(st.integers(2, 8))
def test_a_perfect_learner_has_full_scores_and_no_forgetting(size):
    result = metrics.summary(matrix_of(np.ones((size, size)), np.zeros(size)))
    assert [result[k] for k in ("transfer", "avg", "last", "fwt")] == [1.0] * 4
    assert result["bwt"] == 0.0 and result["forgetting"] == 0.0


@given(st.integers(2, 8).flatmap(lambda n: arrays(np.float64, n, elements=st.floats(0, 1))))
def test_a_model_that_never_learns_neither_forgets_nor_transfers(scores):
    result = metrics.summary(matrix_of(np.tile(scores, (len(scores), 1)), scores))
    assert result["bwt"] == result["forgetting"] == result["fwt"] == 0.0
    assert result["transfer"] == pytest.approx(result["zero_shot_transfer"])
    assert result["avg"] == pytest.approx(result["zero_shot"])
    assert result["last"] == pytest.approx(result["zero_shot"])


@given(st.integers(2, 6), st.floats(0, 1))
def test_a_constant_matrix_gives_its_constant(size, value):
    result = metrics.summary(matrix_of(np.full((size, size), value)))
    for name in ("transfer", "avg", "avg_seen", "last", "average_incremental_accuracy"):
        assert result[name] == pytest.approx(value)


@given(larger_squares, st.randoms())
def test_avg_and_last_do_not_depend_on_the_order_of_the_columns(values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    shuffled = values[:, order]
    assert metrics.avg_zscl(shuffled) == pytest.approx(metrics.avg_zscl(values))
    assert metrics.last(shuffled) == pytest.approx(metrics.last(values))


@given(larger_squares)
def test_forgetting_is_never_below_minus_bwt(values):
    """The best score since learning is at least the score when just learned."""
    assert metrics.forgetting_chaudhry(values) >= -metrics.bwt_lopezpaz(values) - 1e-12


@given(larger_squares)
def test_scores_before_learning_a_task_do_not_count_as_forgotten(values):
    changed = values.copy()
    changed[np.triu_indices(len(values), 1)] = 1.0
    expected = metrics.forgetting_chaudhry(values)
    assert metrics.forgetting_chaudhry(changed) == pytest.approx(expected)


@given(squares)
def test_every_value_stays_in_its_range(values):
    for name, value in metrics.summary(matrix_of(values, values[0])).items():
        if name == "mcl_f_relative":  # a gain may be many times what there was
            assert value is None or value <= 1 + 1e-12
            continue
        signed = ("bwt", "bwt_over_all", "fwt", "forgetting", "cmml_fg", "mcl_f")
        low = -1.0 if name in signed else 0.0
        assert value is None or low - 1e-12 <= value <= 1 + 1e-12


def test_one_task_has_no_transfer_and_nothing_to_forget():
    result = metrics.summary(matrix_of([[0.5]], [0.25]))
    undefined = {
        "transfer",
        "bwt",
        "bwt_over_all",
        "fwt",
        "forgetting",
        "cmml_fg",
        "mcl_t",
        "mcl_f",
        "mcl_f_relative",
        "zero_shot_transfer",
    }
    assert {name for name, value in result.items() if value is None} == undefined
    assert result["last"] == 0.5 and result["zero_shot"] == 0.25


def test_a_metric_that_needs_a_missing_cell_is_none_and_the_others_stand():
    seen_only = np.where(np.tri(3, dtype=bool), HAND, np.nan)
    result = metrics.summary(matrix_of(seen_only))
    missing = {name for name, value in result.items() if value is None}
    assert missing == {"transfer", "avg", "fwt", "zero_shot", "zero_shot_transfer"}
    assert result["forgetting"] == pytest.approx(0.3) == result["cmml_fg"]
    assert metrics.transfer_per_task(seen_only) == (None, None, None)
    assert metrics.avg_per_task(seen_only)[0] == pytest.approx(0.6)


def test_an_unfinished_run_has_no_last():
    values = HAND.copy()
    values[2] = np.nan
    result = metrics.summary(matrix_of(values))
    assert result["last"] is None and result["forgetting"] is None
    assert {result[name] for name in ("cmml_ap", "cmml_fg", "cmml_last")} == {None}
    assert result["transfer"] == pytest.approx(0.4)


def test_every_metric_has_a_definition_and_the_other_way_round():
    assert set(metrics.summary(matrix_of(HAND))) == set(metrics.DEFINITIONS)
    assert all(len(text) > 20 for text in metrics.DEFINITIONS.values())


@pytest.mark.parametrize("wrong", [np.zeros((2, 3)), np.zeros(3), np.zeros((0, 0))])
def test_an_array_that_is_no_square_is_refused_with_its_shape(wrong):
    with pytest.raises(DataError, match=r"square.*got shape"):
        metrics.transfer_zscl(wrong)


def test_a_baseline_or_counts_of_another_length_are_refused():
    with pytest.raises(DataError, match="baseline must have 3 entries"):
        metrics.fwt_lopezpaz(HAND, [0.1, 0.2])
    with pytest.raises(DataError, match="counts must have 3 entries"):
        metrics.average_accuracy(HAND, [1, 2])
    with pytest.raises(DataError, match="counts above 0"):
        metrics.average_incremental_accuracy(HAND, [0, 1, 2])
