"""Continual-learning metrics of an accuracy matrix, each with its formula and its paper.

A[i, j] is the score on task j after learning task i; i, j = 0..T-1, both in learning order. Rows
below and on the diagonal are tasks learned so far, above it tasks still to come. Scores go in and
come out as fractions. A cell that was not evaluated is NaN; a metric that needs such a cell is
None, never a NaN that spreads through a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolora.errors import DataError
from evolora.evaluation.matrix import Matrix

Score = float | None

DEFINITIONS: dict[str, str] = {
    "transfer": (
        "Transfer (ZSCL): for each task but the first, the mean score on it after each earlier "
        "task; then the mean over those tasks. What learning does to tasks still to come."
    ),
    "avg": (
        "Avg (ZSCL): for each task, the mean score on it after every task, learned or not; then "
        "the mean over tasks. Also D-MoLE's AVG if all stages count (avg_all)."
    ),
    "avg_seen": (
        "D-MoLE's AVG if only stages after a task was learned count: for each task, the mean score "
        "on it when it was just learned and after every later task; then the mean over tasks."
    ),
    "last": "Last (ZSCL): the mean score over all tasks after the last one.",
    "average_accuracy": (
        "Average accuracy (Lopez-Paz & Ranzato): the mean of the last row; the same number as Last."
    ),
    "average_incremental_accuracy": (
        "Average incremental accuracy (iCaRL): after each task, the score over all tasks learned "
        "so far; then the mean over those steps. The Avg of class-incremental tables, and the MAA "
        "of CoIN (mean average accuracy)."
    ),
    "bwt": (
        "Backward transfer (Lopez-Paz & Ranzato): for each task but the last, its final score "
        "minus its score when it was just learned; the mean. Negative is forgetting."
    ),
    "bwt_over_all": (
        "Backward transfer over all T tasks: the sum of `bwt` divided by T instead of T - 1, as in "
        "some tables of instruction tuning; the last task counts 0."
    ),
    "fwt": (
        "Forward transfer (Lopez-Paz & Ranzato): for each task but the first, its score just "
        "before it is learned minus its score before any learning; the mean."
    ),
    "forgetting": (
        "Forgetting (Chaudhry et al.): for each task but the last, its best score since it was "
        "learned (the final one left out) minus its final score; the mean."
    ),
    "cmml_ap": (
        "AP (RebQ, DeLo: continual missing-modality learning): average performance, the mean of "
        "the last row; the same number as Last and no average precision."
    ),
    "cmml_fg": (
        "FG (RebQ, DeLo): for each task but the last, its score when it was just learned minus its "
        "final score; the mean. From the diagonal, not from the best score: minus BWT."
    ),
    "cmml_last": (
        "Last (RebQ, DeLo): the score on the last task alone, after it was learned. Not ZSCL's "
        "Last, which is the mean over all tasks."
    ),
    "mcl_t": (
        "T (PathWeave: continual learning of modalities; our reading): the score on each new "
        "modality when it was just learned; the mean. The first task is what the base model knows "
        "and does not count."
    ),
    "mcl_f": (
        "F (PathWeave; our reading): after each new modality, the mean over earlier ones of the "
        "score when it was just learned minus the score now; then the mean over stages. Negative "
        "is gain."
    ),
    "mcl_f_relative": (
        "F as a share: each loss divided by the score when it was just learned. None where that "
        "was 0."
    ),
    "zero_shot": "The mean score over all tasks before any learning.",
    "zero_shot_transfer": (
        "The mean score before any learning over all tasks but the first: the Transfer of a model "
        "that never changes."
    ),
}


def transfer_per_task(values: ArrayLike) -> tuple[Score, ...]:
    """Return Transfer_j = mean_{i<j} A[i, j] per task, (T,); None for the first task, always."""
    matrix = _square(values)
    return tuple(_mean(matrix[:j, j]) for j in range(len(matrix)))


def transfer_zscl(values: ArrayLike) -> Score:
    """Return Transfer = mean_{j>=1} mean_{i<j} A[i, j].

    Columns are averaged first, so each task weighs the same; the flat mean of the upper triangle
    would weigh late tasks more and is another number. None for one task or a missing cell.

    Source: Zheng et al., "Preventing Zero-Shot Transfer Degradation in Continual Learning of
    Vision-Language Models" (ZSCL), ICCV 2023, arXiv 2303.06628.
    """
    return _mean_of(transfer_per_task(values)[1:])


def avg_per_task(values: ArrayLike) -> tuple[Score, ...]:
    """Return Avg_j = mean_i A[i, j] per task, (T,): the whole column, future tasks included."""
    return tuple(_mean(column) for column in _square(values).T)


def avg_zscl(values: ArrayLike) -> Score:
    """Return Avg = mean_j mean_i A[i, j]. Source: ZSCL, ICCV 2023, arXiv 2303.06628."""
    return _mean_of(avg_per_task(values))


def avg_seen_per_task(values: ArrayLike) -> tuple[Score, ...]:
    """Return mean_{i>=j} A[i, j] per task, (T,): its column from the diagonal down."""
    matrix = _square(values)
    return tuple(_mean(matrix[j:, j]) for j in range(len(matrix)))


def avg_seen(values: ArrayLike) -> Score:
    """Return AVG = mean_j mean_{i>=j} A[i, j].

    D-MoLE's AVG is "the average across stages", which leaves open whether stages before a task was
    learned count (`avg_zscl`) or not (this). Columns are averaged first, so each task weighs alike.

    Source: Ge et al., "Dynamic Mixture of Curriculum LoRA Experts for Continual Multimodal
    Instruction Tuning" (D-MoLE), ICML 2025, arXiv 2506.11672.
    """
    return _mean_of(avg_seen_per_task(values))


def last_per_task(values: ArrayLike) -> tuple[Score, ...]:
    """Return Last_j = A[T-1, j] per task, (T,)."""
    return tuple(_mean(cell) for cell in _square(values)[-1][:, None])


def last(values: ArrayLike) -> Score:
    """Return Last = mean_j A[T-1, j]. Source: ZSCL, ICCV 2023, arXiv 2303.06628."""
    return _mean_of(last_per_task(values))


def average_accuracy(values: ArrayLike, counts: ArrayLike | None = None) -> Score:
    """Return ACC = mean_j A[T-1, j], by default every task alike.

    Args:
        values: (T, T) scores.
        counts: (T,) test samples per task; then tasks weigh by their samples.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017,
    arXiv 1706.08840.
    """
    matrix = _square(values)
    return _mean(matrix[-1], _weights(counts, len(matrix)))


def average_incremental_accuracy(values: ArrayLike, counts: ArrayLike | None = None) -> Score:
    """Return mean_i mean_{j<=i} A[i, j]: the accuracy over all tasks seen, averaged over steps.

    Args:
        values: (T, T) scores; cells above the diagonal are not used.
        counts: (T,) test samples per task. With them the inner mean is the accuracy over all
            samples of the seen classes, which is what class-incremental papers report; without
            them tasks weigh alike.

    Source: Rebuffi et al., "iCaRL", CVPR 2017, arXiv 1611.07725; without counts the MAA of CoIN,
    Chen et al., NeurIPS 2024, arXiv 2403.08350.
    """
    matrix = _square(values)
    weights = _weights(counts, len(matrix))
    steps = (
        _mean(matrix[i, : i + 1], None if weights is None else weights[: i + 1])
        for i in range(len(matrix))
    )
    return _mean_of(tuple(steps))


def bwt_lopezpaz(values: ArrayLike) -> Score:
    """Return BWT = 1/(T-1) sum_{j<T-1} (A[T-1, j] - A[j, j]); in [-1, 1], None for one task.

    Source: Lopez-Paz and Ranzato, NeurIPS 2017, arXiv 1706.08840.
    """
    matrix = _square(values)
    return _mean(matrix[-1, :-1] - matrix.diagonal()[:-1])


def bwt_over_all(values: ArrayLike) -> Score:
    """Return 1/T sum_{j<T-1} (A[T-1, j] - A[j, j]) = (T-1)/T BWT; None for one task.

    Papers on continual instruction tuning after CoIN (Chen et al., NeurIPS 2024, arXiv 2403.08350)
    divide by T or by T - 1 without always saying so.
    """
    transfer, tasks = bwt_lopezpaz(values), len(_square(values))
    return None if transfer is None else transfer * (tasks - 1) / tasks


def fwt_lopezpaz(values: ArrayLike, baseline: ArrayLike | None) -> Score:
    """Return FWT = 1/(T-1) sum_{j>=1} (A[j-1, j] - b[j]); in [-1, 1].

    Args:
        values: (T, T) scores.
        baseline: (T,) scores before any learning. In the paper the model starts at random; here
            it starts pretrained, so b is its zero-shot score. None gives None.

    Source: Lopez-Paz and Ranzato, NeurIPS 2017, arXiv 1706.08840.
    """
    matrix = _square(values)
    if baseline is None:
        return None
    return _mean(matrix.diagonal(1) - _vector("baseline", baseline, len(matrix))[1:])


def forgetting_per_task(values: ArrayLike) -> tuple[Score, ...]:
    """Return F_j = max_{j<=i<T-1} A[i, j] - A[T-1, j] per task, (T,); None for the last task.

    The paper defines scores of learned tasks only (j <= i), so a lucky score on a task before it
    was learned does not count as knowledge that was forgotten. Negative where the task improved.
    """
    matrix = _square(values)
    final = matrix[-1]
    drops = [_mean(np.atleast_1d(matrix[j:-1, j].max() - final[j])) for j in range(len(matrix) - 1)]
    return (*drops, None)


def forgetting_chaudhry(values: ArrayLike) -> Score:
    """Return F = 1/(T-1) sum_{j<T-1} (max_{j<=i<T-1} A[i, j] - A[T-1, j]); None for one task.

    Source: Chaudhry et al., "Riemannian Walk for Incremental Learning: Understanding Forgetting and
    Intransigence", ECCV 2018, arXiv 1801.10112.
    """
    return _mean_of(forgetting_per_task(values)[:-1])


def ap_cmml(values: ArrayLike) -> Score:
    """Return AP = mean_j A[T-1, j].

    Source: Zhao et al., "Reconstruct before Query: Continual Missing Modality Learning with
    Decomposed Prompt Collaboration" (RebQ), arXiv 2403.11373.
    """
    return last(values)


def fg_cmml(values: ArrayLike) -> Score:
    """Return FG = 1/(T-1) sum_{j<T-1} (A[j, j] - A[T-1, j]); in [-1, 1], None for one task.

    Source: RebQ, arXiv 2403.11373.
    """
    matrix = _square(values)
    return _mean(matrix.diagonal()[:-1] - matrix[-1, :-1])


def last_cmml(values: ArrayLike) -> Score:
    """Return Last = A[T-1, T-1]: how well the last task was learned.

    Source: RebQ, arXiv 2403.11373.
    """
    return _mean(_square(values)[-1:, -1])


def new_modalities(values: ArrayLike) -> tuple[Score, ...]:
    """Return T_m = S[m, m] of each stage but the first, (T-1,).

    Task 0 is the modality that the base model knows, S[0, 0] its score before any other is learned.

    Source: the two numbers are those of Yu et al., "LLMs Can Evolve Continually on Modality for
    X-Modal Reasoning" (PathWeave), NeurIPS 2024, arXiv 2410.20178; these formulas are ours.
    """
    matrix = _square(values)
    return tuple(_mean(matrix[m : m + 1, m]) for m in range(1, len(matrix)))


def forgetting_of_stages(values: ArrayLike, *, relative: bool = False) -> tuple[Score, ...]:
    """Return F_m = 1/m sum_{i<m} (S[i, i] - S[m, i]) of each stage but the first, (T-1,).

    With ``relative`` each difference is divided by S[i, i]; None where one of them is 0. Source and
    task 0: as for :func:`new_modalities`.
    """
    matrix = _square(values)
    learned = matrix.diagonal()
    found: list[Score] = []
    for m in range(1, len(matrix)):
        lost = learned[:m] - matrix[m, :m]
        if relative and (learned[:m] == 0).any():
            found.append(None)
            continue
        found.append(_mean(lost / learned[:m] if relative else lost))
    return tuple(found)


def summary(matrix: Matrix) -> dict[str, Score]:
    """Return every metric of `DEFINITIONS` by name, as fractions; None where a cell is missing."""
    values, baseline = matrix.values, matrix.baseline
    return {
        "transfer": transfer_zscl(values),
        "avg": avg_zscl(values),
        "avg_seen": avg_seen(values),
        "last": last(values),
        "average_accuracy": average_accuracy(values),
        "average_incremental_accuracy": average_incremental_accuracy(values),
        "bwt": bwt_lopezpaz(values),
        "bwt_over_all": bwt_over_all(values),
        "fwt": fwt_lopezpaz(values, baseline),
        "forgetting": forgetting_chaudhry(values),
        "cmml_ap": ap_cmml(values),
        "cmml_fg": fg_cmml(values),
        "cmml_last": last_cmml(values),
        "mcl_t": _mean_of(new_modalities(values)),
        "mcl_f": _mean_of(forgetting_of_stages(values)),
        "mcl_f_relative": _mean_of(forgetting_of_stages(values, relative=True)),
        "zero_shot": None if baseline is None else _mean(baseline),
        "zero_shot_transfer": None if baseline is None else _mean(baseline[1:]),
    }


def _square(values: ArrayLike) -> NDArray[np.float64]:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise DataError(f"a matrix is square with at least one task; got shape {matrix.shape}")
    return matrix


def _vector(what: str, values: ArrayLike, size: int) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (size,):
        raise DataError(f"{what} must have {size} entries, one per task; got shape {vector.shape}")
    return vector


def _weights(counts: ArrayLike | None, size: int) -> NDArray[np.float64] | None:
    if counts is None:
        return None
    weights = _vector("counts", counts, size)
    if not (weights > 0).all():
        raise DataError(f"weighting by samples needs counts above 0; got {weights.tolist()}")
    return weights


def _mean(cells: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> Score:
    if cells.size == 0 or np.isnan(cells).any():
        return None
    return float(np.average(cells, weights=weights))


def _mean_of(parts: Sequence[Score]) -> Score:
    known = [part for part in parts if part is not None]
    return float(np.mean(known)) if known and len(known) == len(parts) else None
