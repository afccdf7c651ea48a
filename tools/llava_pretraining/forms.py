"""Forms of questions that all subjects share: options to choose from, yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

Turn = tuple[str, str]
"""An instruction and its answer."""
NUMBERS = ("one", "two", "three", "four", "five", "six")
YES_NO = ("", "", " Answer yes or no.", " Yes or no?", " Reply with yes or no.")
BY_LETTER = ("Answer with the letter.", "Which letter is right?", "Give the letter only.", "")
STYLES = (("{}. {}", "ABCDE"), ("{}) {}", "ABCDE"), ("({}) {}", "ABCDE"), ("({}) {}", "abcde"))


def article(words: str) -> str:
    return f"{'an' if words[:1].lower() in 'aeiou' else 'a'} {words}"


def options(question: str, answer: str, wrong: Sequence[str], draw: Random) -> Turn:
    """Returns a question with two to five options; its answer is a letter, or an option."""
    rest = [word for word in dict.fromkeys(wrong) if word != answer]
    offered = [answer, *draw.sample(rest, min(len(rest), draw.randint(1, 4)))]
    draw.shuffle(offered)
    if draw.random() < 0.2:
        return f"{question} Choose from: {', '.join(offered)}.", answer
    style, letters = draw.choice(STYLES)
    lines = [style.format(letter, word) for letter, word in zip(letters, offered, strict=False)]
    line = draw.choice((" ", "\n", ", "))
    text = line.join([question, *lines] if line != ", " else [f"{question} {lines[0]}", *lines[1:]])
    ask = draw.choice(BY_LETTER)
    return f"{text}{' ' if line == ', ' else line}{ask}".rstrip(), letters[offered.index(answer)]


def yes_no(claims: tuple[str, str], draw: Random) -> Turn:
    """Returns a question of a true and a false one, with its answer."""
    wrong = draw.random() < 0.5
    return claims[wrong] + draw.choice(YES_NO), "no" if wrong else "yes"
