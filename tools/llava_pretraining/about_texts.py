"""What is asked and answered about words alone, without a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from llava_pretraining.forms import NUMBERS, Turn, options, yes_no


@dataclass(frozen=True)
class Words:
    """A text without a picture: a name, names near to it, and some other words."""

    name: str
    near: Sequence[str]
    others: Sequence[str]


def _some(words: Sequence[str], least: int, most: int, draw: Random) -> list[str]:
    return draw.sample(words, min(draw.randint(least, most), len(words)))


def _repeat(words: Words, draw: Random) -> Turn:
    said = [words.name, *_some(words.others, 0, 3, draw)]
    draw.shuffle(said)
    text = draw.choice((" ", ", ")).join(said)
    if draw.random() < 0.2:
        text = text.capitalize()
    form = draw.choice(("Repeat: {}", "Say this again: {}", "Copy the text: {}", "Write {}"))
    return form.format(text), text


def _like(words: Words, draw: Random) -> Turn | None:
    if not words.near:
        return None
    asks = ("Which word is most like {}?", "What goes best with {}?", "What is close to {}?")
    return options(draw.choice(asks).format(words.name), words.near[0], words.others, draw)


def _related(words: Words, draw: Random) -> Turn | None:
    if not words.near:
        return None
    count = draw.choice((1, 2, 3))
    asks = ("Name {} like {}.", "List {} related to {}.", "Give {} similar to {}.")
    things = f"{NUMBERS[count - 1]} {'thing' if count == 1 else 'things'}"
    return draw.choice(asks).format(things, words.name), ", ".join(words.near[:count])


def _ends(words: Words, draw: Random) -> Turn:
    said = [words.name, *_some(words.others, 1, 3, draw)]
    draw.shuffle(said)
    place = draw.choice(("first", "last"))
    form = draw.choice(("What is the {} in this list: {}?", "Give the {} of: {}."))
    return form.format(place, ", ".join(said)), said[0 if place == "first" else -1]


def _among(words: Words, draw: Random) -> Turn:
    said = _some(words.others, 2, 4, draw)
    missing, there = words.name, draw.choice(said)
    form = f"Is {{}} in this list: {', '.join(said)}?"
    return yes_no((form.format(there), form.format(missing)), draw)


def _option(words: Words, draw: Random) -> Turn:
    said = [words.name, *_some(words.others, 1, 4, draw)]
    draw.shuffle(said)
    letters = "ABCDE"[: len(said)]
    place = draw.randrange(len(said))
    if draw.random() < 0.5:
        asks = ("Which option is {}?", "Which letter stands for {}?", "Where does it say {}?")
        return options(draw.choice(asks).format(said[place]), said[place], said, draw)
    lines = [f"{letter}. {word}" for letter, word in zip(letters, said, strict=True)]
    return f"What is option {letters[place]}? {', '.join(lines)}", said[place]


TEXT: Mapping[str, tuple[float, Callable[[Words, Random], Turn | None]]] = {
    "repeat": (3, _repeat),
    "option": (3, _option),
    "like": (2, _like),
    "related": (1, _related),
    "ends": (1.5, _ends),
    "among": (1, _among),
}
