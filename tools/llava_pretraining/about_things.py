"""What is asked and answered about named pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from llava_pretraining.forms import NUMBERS, Turn, options, yes_no


@dataclass(frozen=True)
class Thing:
    """What a picture of the corpus shows.

    Args:
        name: what it is called.
        group: of the corpus.
        near: names of similar meaning, the nearest first, without synonyms.
        others: names of other things.
    """

    name: str
    group: str
    near: Sequence[str]
    others: Sequence[str]


def _name(thing: Thing, draw: Random) -> Turn:
    asks = (
        *("What is this?", "Name this picture.", "What does the picture show?", "What is drawn?"),
        *("What do you see?", "Give its name.", "Which name fits?", "Tell me what this is."),
    )
    return draw.choice(asks) + draw.choice(("", "", " Answer in a few words.")), thing.name


def _caption(thing: Thing, draw: Random) -> Turn:
    if draw.random() < 0.5:
        asks = ("Describe the picture in one sentence.", "Say in a sentence what is shown.")
        return draw.choice(asks), f"The picture shows {thing.name}."
    asks = ("Write a caption.", "Give this picture a short caption.", "Caption it.")
    forms = {
        "emoji": f"A colorful drawing of {thing.name}.",
        "icons": f"A simple icon for {thing.name}.",
        "flags": f"The flag of {thing.name}.",
        "scripts": f"Some letters of the {thing.name} script.",
    }
    return draw.choice(asks), forms[thing.group]


def _wrong(thing: Thing, draw: Random) -> str:
    return draw.choice(thing.near[:12] if draw.random() < 0.3 else thing.others)


def _is_it(thing: Thing, draw: Random) -> Turn:
    form = draw.choice(
        ("Is this {}?", "Does the picture show {}?", "Is {} drawn here?", "Can you see {}?")
    )
    return yes_no((form.format(thing.name), form.format(_wrong(thing, draw))), draw)


def _which(thing: Thing, draw: Random) -> Turn:
    asks = ("What is this?", "Which one is shown?", "What does the picture show?", "Pick its name.")
    wrong = [_wrong(thing, draw) for _ in range(6)]
    return options(draw.choice(asks), thing.name, wrong, draw)


def _keywords(thing: Thing, draw: Random) -> Turn:
    count = draw.choice((2, 3, 3, 4))
    asks = (
        *("List {} keywords for the picture.", "Give {} tags.", "Which {} words describe it?"),
        *("Write {} keywords, separated by commas.", "Name {} words that fit."),
    )
    words = [thing.name, *thing.near[: count - 1]]
    return draw.choice(asks).format(NUMBERS[count - 1]), ", ".join(words)


KINDS = {"emoji": "emoji", "icons": "icon", "flags": "flag", "scripts": "writing"}


def _kind(thing: Thing, draw: Random) -> Turn:
    asks = ("What kind of picture is this?", "What sort of drawing is it?", "Which type is it?")
    answer = KINDS[thing.group]
    if draw.random() < 0.5:
        return options(draw.choice(asks), answer, [*KINDS.values(), "photo", "map"], draw)
    return draw.choice(asks), answer


THING: Mapping[str, tuple[float, Callable[[Thing, Random], Turn | None]]] = {
    "name": (5, _name),
    "caption": (2, _caption),
    "is it": (2, _is_it),
    "which": (3, _which),
    "keywords": (2, _keywords),
    "kind": (0.7, _kind),
}
