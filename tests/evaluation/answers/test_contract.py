"""Every metric of generated answers: what it accepts, refuses and promises."""

from __future__ import annotations

import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolora.errors import ConfigError, DataError
from evolora.evaluation.answers import short
from evolora.evaluation.answers.contract import AnswerMetric, per_sample
from evolora.registry import ANSWER_METRICS

NAMES = ANSWER_METRICS.names()
NEEDS_MANY = [name for name in NAMES if "vqa" in name]
OF_TEXTS = [name for name in NAMES if not name.startswith(("option", "iou"))]
RIGHT = {"option-accuracy": "B", "option-accuracy-raw": "B", "iou-accuracy": "[1, 2, 30, 40]"}


def right(name: str, row: int = 0) -> str:
    return RIGHT.get(name, f"small red kite number {row} over water")


def references(name: str, rows: int) -> list[list[str]]:
    return [[right(name, row)] * (10 if name in NEEDS_MANY else 2) for row in range(rows)]


def test_the_metrics_of_the_issue_are_there() -> None:
    assert NAMES == [
        "cider-d",
        "cider-d-share",
        "exact-match",
        "iou-accuracy",
        "option-accuracy",
        "option-accuracy-raw",
        "rouge-l",
        "textvqa-accuracy",
        "token-f1",
        "vqa-accuracy",
        "vqa-accuracy-as-released",
    ]
    for entry in ANSWER_METRICS:
        assert entry.value.name == entry.name and entry.value.higher_is_better and entry.summary


def test_an_unknown_metric_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown metric 'cider'; did you mean 'cider-d'"):
        ANSWER_METRICS.get("cider")


def test_a_name_has_one_owner_whose_module_may_be_imported_again() -> None:
    importlib.reload(short)
    assert ANSWER_METRICS.get("exact-match").owner.endswith("answers.short.exact_match")
    with pytest.raises(ConfigError, match=r"'exact-match' is already registered by .*short"):
        per_sample("exact-match", summary="another")(lambda prediction, references: 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_right_answer_has_the_largest_score_and_no_answer_the_smallest(name: str) -> None:
    metric = ANSWER_METRICS.get(name)
    accepted = references(name, 3)
    perfect = metric.score([right(name, row) for row in range(3)], accepted)
    assert perfect.per_sample == pytest.approx([metric.largest] * 3)
    assert perfect.mean == pytest.approx(metric.largest)
    nothing = metric.score([""] * 3, accepted)
    assert nothing.per_sample == (0.0, 0.0, 0.0) and nothing.mean == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_test_set_is_refused_in_one_sentence(name: str) -> None:
    score = ANSWER_METRICS.get(name).score
    good = references(name, 2)
    for predictions, accepted, message in (
        ([], [], "no answers to judge"),
        (["a"], good, r"1 predictions and 2 lists of references"),
        (["a", "b"], [good[0], []], "sample 1 has no reference"),
        (["a", "b"], ["a", "b"], "references of sample 0 must be a list; got one text"),
        ("ab", good, "got one text"),
        (["a", None], good, "prediction 1 must be a text; got NoneType"),
        (["a", "b"], [good[0], [*good[1], 3]], "references of sample 1 must be texts; got int"),
    ):
        with pytest.raises(DataError, match=message):
            score(predictions, accepted)


words = st.text(alphabet="ab the.'é日😀-1,", max_size=24)


@pytest.mark.parametrize("name", OF_TEXTS)
@given(data=st.data())
def test_any_text_is_judged_within_the_range_whatever_the_order(name: str, data) -> None:
    metric = ANSWER_METRICS.get(name)
    fewest = 4 if name in NEEDS_MANY else 1
    sample = st.tuples(words, st.lists(words, min_size=fewest, max_size=fewest + 2))
    samples = data.draw(st.lists(sample, min_size=1, max_size=5))
    order = data.draw(st.permutations(range(len(samples))))
    found = metric.score(*zip(*samples, strict=True))
    assert all(0 <= score <= metric.largest + 1e-9 for score in found.per_sample)
    turned = [(text, accepted[::-1]) for text, accepted in (samples[i] for i in order)]
    again = metric.score(*zip(*turned, strict=True))
    assert again.per_sample == pytest.approx([found.per_sample[i] for i in order])
    in_place = metric.score(*zip(*(samples[i] for i in order), strict=True))
    assert in_place.mean == found.mean  # to the last bit


def test_a_mean_is_the_same_to_the_last_bit_in_any_order() -> None:
    metric = AnswerMetric(name="x", owner="here", judge=lambda given, _: [*map(float, given)])
    there, back = ["0.1", "0.2", "0.3"], ["0.3", "0.2", "0.1"]  # their running sums differ
    assert metric.score(there, [["a"]] * 3).mean == metric.score(back, [["a"]] * 3).mean


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEEDS_MANY])
def test_a_reference_that_is_said_twice_changes_nothing_where_the_best_one_counts(
    name: str,
) -> None:
    metric = ANSWER_METRICS.get(name)
    said = {
        "option-accuracy": ("B. it", [["B", "it"], ["B", "it", "it"]]),
        "option-accuracy-raw": ("B", [["B", "it"], ["B", "it", "it"]]),
        "iou-accuracy": ("[0,0,9,9]", [["[0,0,9,8]"], ["[0,0,9,8]", "[0,0,9,8]"]]),
    }
    text, (once, twice) = said.get(
        name, ("a red kite on a wall", [["a red kite"], ["a red kite", "a red kite"]])
    )
    other = ["C"] if name.startswith("option") else ["[5, 5, 6, 6]", "a dog"][:1]
    first = metric.score([text, "x"], [once, other])
    assert first.per_sample == pytest.approx(metric.score([text, "x"], [twice, other]).per_sample)
    assert first.per_sample[0] > 0 or name == "exact-match"
