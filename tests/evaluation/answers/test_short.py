"""Exact match and token F1 against the rules of SQuAD's evaluation worked out by hand."""

from __future__ import annotations

import pytest

from evolora.evaluation.answers.short import exact_match, plain, squad_words, token_f1


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("  Stop\n Sign ", "stop sign", True),
        ("stop sign.", "stop sign", False),
        ("the stop sign", "stop sign", False),
        ("cafe\u0301", "CAFÉ", True),  # composed and decomposed letters
        ("cafe", "café", False),
        ("ΔΟΜΟΣ", "δομος", True),  # a last sigma has a small letter of its own
        ("STRASSE", "straße", False),
        ("日本", "日本", True),
        ("", " ", True),
    ],
)
def test_exact_match_ignores_case_and_white_space_and_nothing_else(
    text: str, reference: str, same: bool
) -> None:
    assert exact_match(text, ["something else", reference]) == same


def test_plain_text_is_stable() -> None:
    assert plain(plain(" A\u0301  B\t")) == plain(" A\u0301  B\t") == "\u00e1 b"


def test_squad_words_lose_case_ascii_punctuation_and_articles() -> None:
    words = squad_words("The  dog's U.S.-made (red) hat, an A-b!")
    assert words == ["dogs", "usmade", "red", "hat", "ab"]
    assert squad_words("a «b» the") == ["«b»"]
    assert squad_words("theatre") == ["theatre"]


@pytest.mark.parametrize(
    ("text", "references", "score"),
    [
        # 2 shared of 3 given and 2 accepted: P = 2/3, R = 1, F1 = 4/5
        ("the red kite flies", ["A red kite!"], 0.8),
        # the best reference counts: 1 of 1 and 2 -> 2/3; 0
        ("kite", ["red kite", "dog"], 2 / 3),
        # repeated words count as often as both have them: 1 shared of 3 and 1
        ("dog dog dog", ["dog"], 0.5),
        ("", ["the"], 1.0),
        ("a", ["the", "dog"], 0.0),  # references without words are left out if others have some
        ("", ["dog"], 0.0),
        ("dog", ["!"], 0.0),
        ("日本", ["日本"], 1.0),
    ],
)
def test_token_f1(text: str, references: list[str], score: float) -> None:
    assert token_f1(text, references) == pytest.approx(score)
