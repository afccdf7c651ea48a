"""Answers of batches and processes, put together, score as those of one list."""

from __future__ import annotations

import pickle

import pytest

from evolora.errors import DataError
from evolora.evaluation.answers.formats import parse_formats
from evolora.evaluation.answers.tally import Answered, AnswerTally
from evolora.registry import ANSWER_METRICS

GIVEN = ["a red kite", "a dog on a mat", "the blue sea", "", "a kite flies"]
SAID = [["a red kite flies"], ["a dog on the mat"], ["blue sea", "the sea"], ["a mat"], ["kite"]]
CODES = [0, 2, 0, 1, 2]
CIDER = ANSWER_METRICS.get("cider-d")


def tally_of(rows: list[int]) -> AnswerTally:
    tally = AnswerTally(CIDER)
    for start in range(0, len(rows), 2):
        part = rows[start : start + 2]
        tally.add(part, *([values[row] for row in part] for values in (GIVEN, SAID, CODES)))
    return tally


def test_batches_in_any_order_score_as_one_list() -> None:
    expected = CIDER.score(GIVEN, SAID)
    for rows in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        tally = tally_of(rows)
        assert len(tally) == 5 and tally.score() == expected.mean
        assert [one.prediction for one in tally.answered()] == GIVEN


def test_processes_that_gather_have_the_score_of_one_and_a_row_counts_once() -> None:
    processes = [tally_of([0, 3]), tally_of([1, 4, 0]), tally_of([2])]  # row 0 was padding
    sent = [pickle.loads(pickle.dumps(tally.answered())) for tally in processes]
    everything = [one for part in sent for one in part]
    for tally in processes:
        assert tally.score() != pytest.approx(tally_of([0, 1, 2, 3, 4]).score())
        asked: list[list[Answered]] = []
        own = tally.answered()
        tally.gather(lambda mine, asked=asked: asked.append(mine) or everything)
        assert len(tally) == 5 and tally.score() == CIDER.score(GIVEN, SAID).mean
        assert sorted(asked[0], key=lambda one: one.row) == own


def test_cases_are_judged_with_the_whole_test_set() -> None:
    tally = tally_of([0, 1, 2, 3, 4])
    each = CIDER.score(GIVEN, SAID).per_sample
    assert tally.by_case() == {
        "complete": pytest.approx((each[0] + each[2]) / 2),
        "image_missing": pytest.approx((each[1] + each[4]) / 2),
        "text_missing": each[3],
    }
    complete = AnswerTally(CIDER)
    complete.add([7, 9], GIVEN[:2], SAID[:2])
    assert set(complete.by_case()) == {"complete"}


def test_a_batch_that_does_not_fit_and_an_empty_tally_are_refused() -> None:
    tally = AnswerTally(CIDER)
    with pytest.raises(DataError, match=r"as many rows, predictions, references.*got 2, 1, 2, 2"):
        tally.add([0, 1], ["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match="no answers to judge"):
        tally.score()


def test_captions_and_short_answers_are_judged_apart() -> None:
    formats = parse_formats("words:1|sentence")
    tally = AnswerTally(ANSWER_METRICS.get("exact-match"), formats)
    answers = [
        ("chair", ("chair",)),
        ("a red chair", ("chair",)),
        ("A red chair turning left.", ("A red chair turning left.",)),
        ("A blue table.", ("A green lamp going away.",)),
    ]
    tally.add(range(4), [said for said, _ in answers], [right for _, right in answers])
    assert tally.questions() == pytest.approx(1 / 2) and tally.score() == pytest.approx(2 / 4)
    alone = CIDER.score([said for said, _ in answers[2:]], [right for _, right in answers[2:]])
    assert tally.captions() == pytest.approx(alone.mean) and alone.mean > 4.0
    for other in (AnswerTally(CIDER, formats), AnswerTally(ANSWER_METRICS.get("exact-match"))):
        other.add(range(4), [said for said, _ in answers], [right for _, right in answers])
        assert other.captions() is None and other.questions() is None
