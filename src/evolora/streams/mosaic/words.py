"""Makes a short text of a drawing's keywords in which no label occurs.

A word that is a label's, an inflection of one or a compound with one is left out, whichever class
of the stream it names: with the labels in it, the text would be the answer.
"""

from __future__ import annotations

import html
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

MAX_WORDS = 3  # keywords in one text
_OFTEN, _SHARED, _PURE = 3, 0.08, 0.7  # see telltale_words
_NO_CONTENT = frozenset(
    ("a", "an", "and", "at", "by", "for", "in", "of", "on", "or", "the", "with")
)
_SUFFIXES = ("ings", "ing", "ies", "es", "ed", "er", "s", "y", "e")
_IRREGULAR = {"men": "man", "women": "woman", "people": "person", "feet": "foot", "leaves": "leaf"}
_SHORTEST_PART = 4  # a shorter stem counts as a part of no word: "car" is not in "scarf"


def split_words(text: str) -> list[str]:
    """Returns the lower-case words of a text, without digits and punctuation."""
    return re.findall(r"[a-zà-öø-ÿ]+", html.unescape(text).lower())


def stem(word: str) -> str:
    """Returns the word without the ending that English inflection gives it ("parties": "part")."""
    word = _IRREGULAR.get(word, word)
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word.removesuffix(suffix)
            break
    # "shopping", "hit" and "hitting"
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def label_stems(labels: Iterable[str]) -> frozenset[str]:
    """Returns the stems of all content words of the labels.

    Of a long word its beginning too, which words made of it share ("navig..." of "navigation").
    """
    words = {word for label in labels for word in split_words(label)} - _NO_CONTENT
    begin = {word[: max(5, len(word) - 3)] for word in words if len(word) >= 6}
    return frozenset(begin.union(map(stem, words)))


def names_a_label(word: str, stems: frozenset[str]) -> bool:
    """Returns whether the word is a label's, an inflection of it or a compound with it."""
    parts = (each for each in stems if len(each) >= _SHORTEST_PART)
    return stem(word) in stems or any(part in word for part in parts)


def usable_words(candidates: Iterable[str], stems: frozenset[str]) -> tuple[str, ...]:
    """Returns the keywords, each once, without their words that name a label."""
    kept: dict[str, None] = {}
    for candidate in candidates:
        words = [word for word in split_words(candidate) if not names_a_label(word, stems)]
        if any(len(word) > 2 and word not in _NO_CONTENT for word in words):
            kept[" ".join(words)] = None
    return tuple(kept)


def telltale_words(
    objects: Collection[tuple[Collection[str], Collection[str]]],
) -> frozenset[str]:
    """Returns the keywords that are a label under another name ("animal" for mammals).

    Such a keyword is given to at least `_OFTEN` objects of a label and `_SHARED` of them, and at
    least `_PURE` of the objects that have it have that label.

    Args:
        objects: keywords and labels of each object.
    """
    uses: Counter[str] = Counter()
    both: Counter[tuple[str, str]] = Counter()
    size: Counter[str] = Counter()
    for words, labels in objects:
        uses.update(set(words))
        size.update(labels)
        both.update((word, label) for word in set(words) for label in labels)
    return frozenset(
        word
        for (word, label), count in both.items()
        if count >= _OFTEN and count >= _SHARED * size[label] and count >= _PURE * uses[word]
    )


def short_text(words: Sequence[str], seed: str) -> str:
    """Returns at most `MAX_WORDS` of the keywords, drawn by seed, in their order, no word twice."""
    chosen = random.Random(seed).sample(range(len(words)), min(MAX_WORDS, len(words)))
    text = " ".join(words[index] for index in sorted(chosen))
    return " ".join(dict.fromkeys(text.split()))
