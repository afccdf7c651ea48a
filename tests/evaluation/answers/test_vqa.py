"""VQA accuracy against its formula, and the normal forms that the released code gives."""

from __future__ import annotations

import pytest

from evolora.errors import DataError
from evolora.evaluation.answers.vqa import (
    CONTRACTIONS,
    textvqa_accuracy,
    textvqa_words,
    vqa_accuracy,
    vqa_accuracy_as_released,
    vqa_words,
)
from evolora.registry import ANSWER_METRICS


@pytest.mark.parametrize(
    ("agree", "score"),
    # n of 10 agree: n subsets without one of them min((n-1)/3, 1), 10 - n with all: min(n/3, 1)
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_the_mean_over_subsets_of_nine(agree: int, score: float) -> None:
    said = ["cat"] * agree + ["dog", "cow", "owl", "bee", "ant", "elk", "hen", "pig", "rat", "yak"]
    assert vqa_accuracy("cat", said[:10]) == pytest.approx(score, abs=1e-15)
    subsets = [min(sum(x == "cat" for x in said[:i] + said[i + 1 : 10]) / 3, 1) for i in range(10)]
    assert vqa_accuracy("cat", said[:10]) == pytest.approx(sum(subsets) / 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Two dogs", "2 dogs"),
        ("None", "0"),
        ("yes!", "yes"),
        ("yes , no", "yes no"),
        ("black-white", "black white"),  # no space beside it: a space instead
        ("black- white", "black white"),
        ("1,000", "1000"),  # a comma in a number: all punctuation is deleted,
        ("1,000/day", "1000day"),  # even the slash
        ("3.5 ft.", "3.5 ft"),
        ("u.s.a.", "usa"),
        ("10:30", "10:30"),
        ("dont", "don't"),
        ("im", "im"),  # the released table has "Im", which no lower-case word equals
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("dog's", "dog's"),
        ("\tan owl\n", "owl"),
        ("Ñandú", "ñandú"),
        ("the", ""),
    ],
)
def test_words_as_the_released_code_normalises_predictions(text: str, words: str) -> None:
    assert vqa_words(text) == words


def test_the_table_of_contractions_is_of_the_released_size() -> None:
    # 120 entries there, less four with a capital I and two that map a word to itself.
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["y'alld've"] == CONTRACTIONS["yall'd've"] == "y'all'd've"
    assert CONTRACTIONS["'ows'at"] == "'ow's'at" and "shed" not in CONTRACTIONS


def test_textvqa_cuts_the_genitive_and_deletes_commas_first() -> None:
    assert textvqa_words("Macy's, the Store?") == "macy 's store"
    assert textvqa_words("a,b") == "ab" and vqa_words("a,b") == "b"  # "a b", and a is an article


def test_both_sides_are_normalised_unless_the_released_rule_is_asked_for() -> None:
    said = ["two"] * 4 + ["Two!"] * 2 + ["three"] * 4
    assert vqa_accuracy("two", said) == textvqa_accuracy("2", said) == 1.0
    # as released the answer becomes "2", what people said stays "two" and "Two"
    assert vqa_accuracy_as_released("two", said) == 0.0
    # where all agree nothing of theirs is touched
    assert vqa_accuracy_as_released("yes", ["yes!"] * 10) == 0.0
    assert vqa_accuracy_as_released("yes", ["yes!"] * 9 + ["yes"]) == 0.3
    assert vqa_accuracy_as_released("e-mail", ["e-mail"] * 5 + ["mail"] * 5) == 1.0
    assert vqa_accuracy("yes", ["yes!"] * 9 + ["yes"]) == 1.0


def test_fewer_than_four_people_cannot_be_right() -> None:
    with pytest.raises(DataError, match=r"at least 4 .*got 3; exact-match"):
        vqa_accuracy("cat", ["cat"] * 3)
    with pytest.raises(DataError, match="vqa-accuracy, sample 1: "):
        ANSWER_METRICS.get("vqa-accuracy").score(["cat", "cat"], [["cat"] * 4, ["cat"]])
    assert vqa_accuracy("cat", ["cat"] * 4) == 1.0
