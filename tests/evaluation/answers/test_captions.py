"""CIDEr-D and ROUGE-L against numbers of pycocoevalcap 1.2 and sums done by hand."""

from __future__ import annotations

import math

import pytest

from evolora.evaluation.answers.captions import (
    cider_d,
    cider_d_of_words,
    rouge_l,
    rouge_l_of_words,
)
from evolora.evaluation.answers.words import caption_words
from evolora.registry import ANSWER_METRICS

GIVEN = ["a red kite in the sky", "a dog sits on a mat", "the dog the dog the dog"]
SAID = [
    ["a red kite flies in the blue sky", "a kite in the sky"],
    ["a dog sits on the mat", "dog on a mat", "a dog sits on the mat"],
    ["a dog runs"],
]


def cut(texts: list[str]) -> list[list[str]]:
    return [text.split() for text in texts]


def test_the_scores_of_pycocoevalcap_on_the_same_words() -> None:
    """Printed by its Cider and Rouge, which were given these captions as they are."""
    found = cider_d_of_words(cut(GIVEN), [cut(said) for said in SAID])
    assert found == pytest.approx([4.927196058308082, 5.2581456015675565, 0.1800512467667875])
    assert ANSWER_METRICS.get("cider-d").score(GIVEN, SAID).mean == pytest.approx(3.455130968880809)
    scores = [rouge_l_of_words(a.split(), cut(b)) for a, b in zip(GIVEN, SAID, strict=True)]
    assert scores == pytest.approx([1.0, 0.9242424242424241, 0.2364341085271318])


def test_cider_d_by_hand() -> None:
    # N = 2, no n-gram is in both samples: every idf is log 2 and cancels in the cosines.
    # "kite kite" and "kite": 1-grams min(2, 1) * 1 / (2 * 1) = 1/2, no longer ones in common;
    # lengths are 2 and 1; mean over four n, times 10.
    found = cider_d(["kite kite", "a dog"], [["kite"], ["the sea"]])
    assert found == pytest.approx([10 * 0.5 / 4 * math.exp(-1 / 72), 0.0])
    # A word that every sample's references have says nothing: its idf is 0.
    assert cider_d(["a", "a"], [["a kite"], ["a dog"]]) == [0.0, 0.0]


def test_repeating_a_word_gains_nothing_and_length_costs() -> None:
    said = [["red kite"], ["dog"]]
    once, often = (cider_d([text, ""], said)[0] for text in ("red kite", "red kite kite kite"))
    assert often < once == pytest.approx(5.0)  # two words have no 3-grams and no 4-grams


def test_one_sample_has_no_idf() -> None:
    assert cider_d(["a red kite flies"], [["a red kite flies"]]) == [0.0]


def test_more_references_of_a_sample_are_averaged_and_are_one_document() -> None:
    kite, dog = "a red kite flies", "the dog sits here"
    alone, other = cider_d([kite, dog], [[kite], [dog]])
    assert alone == other == pytest.approx(10.0)
    both = cider_d([kite, dog], [[kite, "nothing of it at all"], [dog]])[0]
    assert both == pytest.approx(alone / 2)
    assert cider_d([kite, dog], [[kite, kite], [dog]]) == pytest.approx([10.0, 10.0])


def test_rouge_l_by_hand() -> None:
    # "a c d" in "a b c d e": 3 of 4 and 3 of 5
    precision, recall, b2 = 3 / 4, 3 / 5, 1.44
    expected = (1 + b2) * precision * recall / (recall + b2 * precision)
    assert rouge_l("a x c d", ["a b c d e"]) == pytest.approx(expected)
    # precision from one reference and recall from the other
    assert rouge_l("a b c", ["a b c d e f", "b"]) == pytest.approx(1.0)
    assert rouge_l("b a", ["a b"]) == pytest.approx(0.5)
    assert rouge_l("", ["a b"]) == rouge_l("x", ["a b"]) == 0.0
    assert rouge_l(".", ["!"]) == 1.0  # nothing is left of either


@pytest.mark.parametrize(
    ("text", "words"),
    [  # as Stanford's tokenizer cuts them for pycocoevalcap
        ("A man's dog isn't 50% off, costs $5.00!", "a man 's dog is n't 50 % off costs $ 5.00"),
        ("I cannot, gonna wanna", "i can not gon na wan na"),
        (
            "t-shirt (well-known) [x] {y}",
            "t-shirt -lrb- well-known -rrb- -lsb- x -rsb- -lcb- y -rcb-",
        ),
        ("and/or 9:30 a.m. U.S. Mr. Smith's", "and/or 9:30 a.m. u.s. mr. smith 's"),
        ("“quoted” 'single' ‘curl’ it’s", "quoted single curl it 's"),
        ("one... two -- three – four—five", "one two three four five"),
        ("AT&T 3,000 people; #tag @user www.x.com", "at&t 3,000 people #tag @user www.x.com"),
        ("don't won't CAN'T I'm they've o'clock", "do n't wo n't ca n't i 'm they 've o'clock"),
        ("naïve café 日本語", "naïve café 日本語"),
        ("the '80s rock 'n' roll y'all", "the '80s rock 'n' roll y' all"),
        ("men's/women's no. 5, no.", "men 's / women 's no. 5 no"),
        ("emoji 😀 ok?! hm !!!", "emoji ok ?! hm !!!"),
        ("€5 £3 a*b a_b -5", "$ 5 # 3 a * b a_b -5"),
        (" \n\t", ""),
    ],
)
def test_caption_words(text: str, words: str) -> None:
    assert caption_words(text) == words.split()
