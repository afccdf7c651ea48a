"""Formats of answers: whether an answer has the form that was asked for, right or wrong.

A format is written "name" or "name:detail":

    letter:ABCD   one of these capital letters and nothing else ("letter": any capital)
    yes-no        "yes" or "no"
    number        a number in digits
    words:3       one to three words ("words": any number), no full stop or comma
    phrase:3      the same after "a", "an", "the" or "some"
    list:3        three entries with commas between ("list": two or more), no full stop
    sentence      one sentence of three words or more with its full stop
    box           [x1, y1, x2, y2] in whole numbers from 0 to 1000

A task that asks in several ways names several, "yes-no|words:1": a sample demands the first of them
that its own right answer has. Case counts for letters alone, as it does in `exact-match`.

The normalised score is 1 if the answer is right once its form is put aside: what lies between it
and the raw score is format, not knowledge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from evolora.errors import ConfigError, suggest
from evolora.evaluation.answers.boxes import read_box
from evolora.evaluation.answers.choices import option_accuracy, option_letter
from evolora.evaluation.answers.contract import References
from evolora.evaluation.answers.short import plain, squad_words
from evolora.evaluation.answers.vqa import vqa_words

NORMALISED = ("exact-match", "option-accuracy", "option-accuracy-raw")
"""Metrics beside which a normalised score is kept; the others look past the form themselves."""
LARGEST_COORDINATE = 1000

_LONGEST_ENTRY = 4  # words of one entry of a list
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_ARTICLE = re.compile(r"(?:a|an|the|some)\s+", re.IGNORECASE)
_SENTENCE = re.compile(r"[^.!?]*\w[.!?]")
_BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")
_LEAD = re.compile(
    r"(?:(?:the|my) answer is|answer:|(?:it|this|that) is|(?:it|that)['’]s)\s+", re.IGNORECASE
)


@dataclass(frozen=True)
class AnswerFormat:
    """One format.

    Args:
        name: key of `FORMATS`.
        detail: letters to choose from, or how many words or entries; "" for any.
    """

    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.detail}" if self.detail else self.name

    def fits(self, answer: str) -> bool:
        """Return whether an answer has this form."""
        return FORMATS[self.name].fits(answer.strip(), self.detail)

    def bare(self, answer: str) -> str:
        """Return what an answer says, without its form; "" where that cannot be told."""
        return FORMATS[self.name].bare(answer)


@dataclass(frozen=True)
class _Form:
    """How a format is told (of a trimmed text and the detail) and put aside; its details."""

    fits: Callable[[str, str], bool]
    bare: Callable[[str], str]
    detail: str  # pattern of what may follow the colon


def parse_formats(written: str) -> tuple[AnswerFormat, ...]:
    """Return the formats of a task, "yes-no|words:1"; none of "".

    Raises:
        ConfigError: an unknown format, or a detail that it does not take.
    """
    found = []
    for part in written.split("|") if written else ():
        name, _, detail = part.strip().partition(":")
        if name not in FORMATS:
            raise ConfigError(
                f"unknown answer format {name!r}{suggest(name, FORMATS)} "
                f"(known: {', '.join(FORMATS)}; several are written with | between)"
            )
        if not re.fullmatch(FORMATS[name].detail, detail):
            raise ConfigError(
                f"answer format {part.strip()!r}: {name} takes "
                f"{_DETAILS[FORMATS[name].detail]}; got {detail!r}"
            )
        found.append(AnswerFormat(name, detail))
    return tuple(found)


def demanded(formats: tuple[AnswerFormat, ...], references: References) -> AnswerFormat:
    """Return the format that a sample demands: the first that its first reference has."""
    return next((one for one in formats if one.fits(references[0])), formats[0])


def follows(formats: tuple[AnswerFormat, ...], prediction: str, references: References) -> bool:
    """Return whether an answer has the format that its sample demands."""
    return demanded(formats, references).fits(prediction)


def normalised_match(
    formats: tuple[AnswerFormat, ...], prediction: str, references: References
) -> float:
    """Return 1 if the answer is a reference once the form of both is put aside, else 0."""
    form = demanded(formats, references)
    if form.name == "letter":
        return option_accuracy(prediction, references)
    accepted = {form.bare(one) for one in references} | set(map(plain, references))
    said = form.bare(prediction)
    return float((bool(said) and said in accepted) or plain(prediction) in accepted)


def _is_letter(text: str, letters: str) -> bool:
    return re.fullmatch("[A-Z]", text) is not None and (not letters or text in letters)


def _is_words(text: str, most: str) -> bool:
    words = text.split()
    whole = all(_WORD.fullmatch(word) for word in words)
    return whole and bool(words) and (not most or len(words) <= int(most))


def _is_phrase(text: str, most: str) -> bool:
    article = _ARTICLE.match(text)
    return article is not None and _is_words(text[article.end() :], most)


def _is_list(text: str, entries: str) -> bool:
    parts = [part.strip() for part in text.split(",")]
    right = len(parts) == int(entries) if entries else len(parts) >= 2
    return right and all(_is_words(part, str(_LONGEST_ENTRY)) for part in parts)


def _is_sentence(text: str, _: str) -> bool:
    return _SENTENCE.fullmatch(text) is not None and len(_WORD.findall(text)) >= 3


def _is_box(text: str, _: str) -> bool:
    found = _BOX.fullmatch(text)
    if found is None:
        return False
    left, top, right, bottom = map(int, found.groups())
    return left < right <= LARGEST_COORDINATE and top < bottom <= LARGEST_COORDINATE


def _yes_or_no(text: str) -> str:
    said = {word for word in re.findall(r"[a-z]+", text.lower()) if word in ("yes", "no")}
    return said.pop() if len(said) == 1 else ""


def _number(text: str) -> str:
    found = set(_NUMBER.findall(vqa_words(text)))
    return f"{float(found.pop()):g}" if len(found) == 1 else ""


def _words(text: str) -> str:
    return " ".join(squad_words(_LEAD.sub("", text.strip(), count=1)))


def _entries(text: str) -> str:
    return ", ".join(sorted(filter(None, map(_words, re.split(r"[,;\n]|\band\b", text)))))


def _box(text: str) -> str:
    box = read_box(text)
    return "" if box is None else ", ".join(f"{side:g}" for side in box)


_ANY, _COUNT, _LETTERS = "", r"(?:[1-9]\d?)?", "[A-Z]*"
_DETAILS = {
    _ANY: "nothing after it",
    _COUNT: "a number from 1 to 99 after the colon",
    _LETTERS: "capital letters after the colon",
}

FORMATS: Mapping[str, _Form] = MappingProxyType(
    {
        "letter": _Form(_is_letter, lambda text: option_letter(text) or "", _LETTERS),
        "yes-no": _Form(lambda text, _: text.lower() in ("yes", "no"), _yes_or_no, _ANY),
        "number": _Form(lambda text, _: _NUMBER.fullmatch(text) is not None, _number, _ANY),
        "words": _Form(_is_words, _words, _COUNT),
        "phrase": _Form(_is_phrase, _words, _COUNT),
        "list": _Form(_is_list, _entries, _COUNT),
        "sentence": _Form(_is_sentence, _words, _ANY),
        "box": _Form(_is_box, _box, _ANY),
    }
)
