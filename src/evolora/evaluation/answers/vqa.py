"""VQA accuracy: an answer is right as far as people gave it too.

    accuracy = mean over the n people of min(m / 3, 1)

where m is how many of the other n - 1 people gave the answer. Data sets have n = 10.

Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015, arXiv 1505.00468; its released
evaluation (vqaEval.py), and the variant of TextVQA, which InternVL and D-MoLE use for VizWiz.

Departures from the released code: it normalises what people said by its punctuation rule alone, and
not at all where all said the same, since published answers are already normal; here both sides are
normalised alike, so that "two" is what "Two" means in anybody's data. `vqa_accuracy_as_released` is
the released rule. In both, all full stops are looked at and not the first 32.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from evolora.errors import DataError
from evolora.evaluation.answers.contract import References, per_sample

FEWEST = 4
"""Fewer people could not give any answer the full score."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = dict(
    zip(
        "none zero one two three four five six seven eight nine ten".split(),
        "0 0 1 2 3 4 5 6 7 8 9 10".split(),
        strict=True,
    )
)

# Written without its apostrophe, each of these gets it back. Words that are others without it
# (she'd, we're, I'll) are not in the released table.
_SHORT = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't
we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()
# Written without one of its apostrophes, each of these gets it back.
_DOUBLE = """
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've
you'd've
""".split()


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _SHORT}
    for word in _DOUBLE:
        for place, letter in enumerate(word):
            if letter == "'":
                table[word[:place] + word[place + 1 :]] = word
    return table | {"somebody'd": "somebodyd"}  # the wrong way round, as released


CONTRACTIONS = _contractions()


def vqa_words(text: str) -> str:
    """Return an answer as VQA compares it: without punctuation and articles, numbers as digits.

    Punctuation beside a space, or in a text with a number like 1,000, is deleted; other punctuation
    becomes a space; full stops go unless a digit follows. Colons and apostrophes stay. Then lower
    case, "two" as "2" up to ten, no a, an, the, and "dont" as "don't".
    """
    words = (_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def textvqa_words(text: str) -> str:
    """Return `vqa_words` after TextVQA's first step: commas and "?" deleted, a space before 's."""
    return vqa_words(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


@per_sample("vqa-accuracy", summary="VQA v2's soft accuracy against what ten people answered")
def vqa_accuracy(prediction: str, references: References) -> float:
    """Return the soft accuracy after `vqa_words` of both sides.

    Raises:
        DataError: fewer than four references.
    """
    return _agreement(vqa_words(prediction), [vqa_words(one) for one in references])


@per_sample("vqa-accuracy-as-released", summary="VQA v2's, with the sides normalised as released")
def vqa_accuracy_as_released(prediction: str, references: References) -> float:
    """Return the soft accuracy with only punctuation of people's answers normalised, see above."""
    said = [" ".join(one.splitlines()) for one in references]
    if len(set(said)) > 1:
        said = [_without_punctuation(one) for one in said]
    return _agreement(vqa_words(prediction), said)


@per_sample("textvqa-accuracy", summary="VQA accuracy in TextVQA's variant, also used for VizWiz")
def textvqa_accuracy(prediction: str, references: References) -> float:
    """Return the soft accuracy after `textvqa_words` of both sides; errors of `vqa_accuracy`."""
    return _agreement(textvqa_words(prediction), [textvqa_words(one) for one in references])


def _agreement(answer: str, said: Sequence[str]) -> float:
    people = len(said)
    if people < FEWEST:
        raise DataError(
            f"VQA accuracy asks what several people said, at least {FEWEST} (data sets have 10); "
            f"got {people}; exact-match takes one reference"
        )
    same = sum(one == answer for one in said)
    # Without one of those who agree, same - 1 are left; without one of the others, same.
    total = same * min(same - 1, 3) + (people - same) * min(same, 3)
    return float(Fraction(total, 3 * people))


def _without_punctuation(text: str) -> str:
    everywhere = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or everywhere else " ")
    return _FULL_STOP.sub("", cleaned)
