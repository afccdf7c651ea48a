"""Multiple choice: which option's letter a text names, raw and whatever its form.

The references of a sample are the right option's letter and, if wanted, its text: ("B", "a red
kite"). The raw score takes the letter alone; what lies between the two scores is format, not
knowledge.
"""

from __future__ import annotations

import re

from evolora.errors import DataError
from evolora.evaluation.answers.contract import References, per_sample
from evolora.evaluation.answers.short import plain

_ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_LEADING = re.compile(r"[\W_]*([A-Za-z])\s*[.):\]](?=\s*$|\s(?!\s*(?:and|or)\b))")
_AFTER = r"[\s:]*(?:is|are|be|:)?[\s\"'(*\[]*(?:([A-Z])(?!['’\w])|(?-i:([a-z]))(?=[)\]]|[\W_]*$))"
_ANSWER = re.compile(rf"(?i:\banswer){_AFTER}")
_OPTION = re.compile(rf"(?i:\b(?:option|choice)){_AFTER}")
# A and I are words themselves before any word but these.
_CAPITAL = re.compile(r"(?<![\w'’])(?![AI]\s+(?!(?:and|or|is|because|since)\b)\w)([A-Z])(?![\w'’])")


def option_letter(text: str) -> str | None:
    """Return the letter of the option that a text names, or None.

    In this order: the letter is all there is ("(b)"), it leads ("B. a kite", "b) a kite"), follows
    "answer" ("the answer is B"), follows "option" or "choice", or is a capital of its own. At the
    first of these that finds any, several different letters are no answer.
    """
    whole = _ALONE.fullmatch(text) or _LEADING.match(text)
    if whole:
        return whole.group(1).upper()
    for pattern in (_ANSWER, _OPTION, _CAPITAL):
        named = {next(filter(None, found.groups())).upper() for found in pattern.finditer(text)}
        if named:
            return named.pop() if len(named) == 1 else None
    return None


@per_sample("option-accuracy", summary="multiple choice, the letter read from free text")
def option_accuracy(prediction: str, references: References) -> float:
    """Return 1 if the text names the right letter, or is the right option's text.

    InternVL and D-MoLE take the first character if it is an option's letter ("Both" is B) and else
    the first option whose text occurs in the answer.

    Raises:
        DataError: the first reference is no letter.
    """
    letter, *texts = references
    right = _right_letter(letter)
    if option_letter(prediction) == right:
        return 1.0
    said = plain(prediction).rstrip(".")
    alone = _ALONE.fullmatch(prediction) is not None  # a letter is a letter, whatever the texts
    return float(not alone and said in {plain(text).rstrip(".") for text in texts})


@per_sample("option-accuracy-raw", summary="multiple choice, the letter and nothing else")
def option_accuracy_raw(prediction: str, references: References) -> float:
    """Return 1 if the text, trimmed, is the right capital letter; errors of `option_accuracy`."""
    return float(prediction.strip() == _right_letter(references[0]))


def _right_letter(reference: str) -> str:
    letter = reference.strip().upper()
    if not re.fullmatch("[A-Z]", letter):
        raise DataError(
            "the first reference of a multiple choice must be the right option's letter, A to Z; "
            f"got {reference!r}"
        )
    return letter
