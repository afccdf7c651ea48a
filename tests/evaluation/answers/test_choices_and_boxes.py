"""The letter of an option, and a box, as people and models write them."""

from __future__ import annotations

import pytest

from evolora.errors import DataError
from evolora.evaluation.answers.boxes import iou_accuracy, overlap, read_box
from evolora.evaluation.answers.choices import (
    option_accuracy,
    option_accuracy_raw,
    option_letter,
)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (b) ", "B"),
        ("**C**.", "C"),
        ("B. a red kite", "B"),
        ("b) a red kite", "B"),
        ("(D) The dog", "D"),
        ("The answer is B.", "B"),
        ("Answer: (c)", "C"),
        ("the answer is a dog", None),
        ("The correct option is C because A is wrong", "C"),
        ("Option A is wrong; the answer is B", "B"),
        ("The answer is B, not option A", "B"),
        ("I'd say B", "B"),
        ("I think it is B", "B"),
        ("A dog", None),
        ("A Red Kite", None),
        ("I do not know", None),
        ("A is right", "A"),
        ("A, since it flies", "A"),
        ("A or B", None),
        ("(A) and (B)", None),
        ("Both of them", None),
        ("a red kite", None),
        ("", None),
        ("日本", None),
        ("i.e. a kite", None),
    ],
)
def test_option_letter(text: str, letter: str | None) -> None:
    assert option_letter(text) == letter


def test_format_is_what_lies_between_raw_and_normalised_accuracy() -> None:
    right = ("B", "a red kite")
    for text, normalised, raw in (
        ("B", 1, 1),
        (" B\n", 1, 1),
        ("b", 1, 0),
        ("B. a red kite", 1, 0),
        ("A Red Kite.", 1, 0),
        ("A. a red kite", 0, 0),  # another letter beside the right text
        ("a dog", 0, 0),
        ("", 0, 0),
    ):
        assert option_accuracy(text, right) == normalised, text
        assert option_accuracy_raw(text, right) == raw, text
    assert option_accuracy("a red kite", ("B",)) == 0
    assert option_accuracy("Plan B", ("A", "plan b")) == 1
    assert option_accuracy("B", ("A", "b")) == 0


@pytest.mark.parametrize("wrong", ["", "BC", "1", "é"])
def test_the_first_reference_must_be_a_letter(wrong: str) -> None:
    for accuracy in (option_accuracy, option_accuracy_raw):
        with pytest.raises(DataError, match="must be the right option's letter, A to Z; got"):
            accuracy("B", (wrong, "a kite"))


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[[10, 20, 30, 40]]", (10, 20, 30, 40)),
        ("<ref>kite</ref><box>[[1,2,3,4]]</box>", (1, 2, 3, 4)),
        ("(1,2),(3,4)", (1, 2, 3, 4)),
        ("It is at [0.1, 0.2, 0.35, 0.4] or [5,6,7,8].", (0.1, 0.2, 0.35, 0.4)),
        ("[1, 2, 3]", None),
        ("no box", None),
        ("", None),
    ],
)
def test_read_box(text: str, box: tuple[float, ...] | None) -> None:
    assert read_box(text) == box


def test_overlap_by_hand() -> None:
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0
    assert overlap((10, 10, 0, 0), (0, 0, 10, 10)) == 0.0  # turned over
    assert overlap((3, 3, 3, 3), (3, 3, 3, 3)) == 0.0


def test_half_an_overlap_is_enough_and_any_reference_will_do() -> None:
    said = ["[0, 0, 10, 10]"]
    assert iou_accuracy("[0, 0, 10, 5]", said) == 1.0  # exactly 0.5
    assert iou_accuracy("[0, 0, 10, 4]", said) == 0.0
    assert iou_accuracy("[90, 90, 99, 99]", [*said, "[90, 90, 99, 99]"]) == 1.0
    assert iou_accuracy("somewhere", said) == 0.0


@pytest.mark.parametrize("wrong", ["here", "[5, 5, 5, 9]", "[9, 9, 1, 1]"])
def test_a_reference_without_a_box_is_refused(wrong: str) -> None:
    with pytest.raises(DataError, match="must hold a box"):
        iou_accuracy("[0, 0, 1, 1]", [wrong])
