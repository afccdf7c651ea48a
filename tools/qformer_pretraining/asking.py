"""What is asked and answered: about pictures, about described things, about words alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from llava_pretraining.about_scenes import SCENE
from llava_pretraining.about_texts import Words
from llava_pretraining.about_things import THING, Thing
from llava_pretraining.asking import FORMATS
from llava_pretraining.forms import Turn
from llava_pretraining.scenes import Scene
from llava_pretraining.subjects import Subjects
from qformer_pretraining.about_views import VIEW, View
from qformer_pretraining.facts import draw_fact

Formats = Mapping[str, tuple[float, Callable[[Any, Random], Turn | None]]]


@dataclass(frozen=True)
class Asked:
    """A question and its answer.

    Args:
        question: what is asked.
        answer: and answered.
        told: stands before it in place of a picture, or before a picture's soft tokens.
        shown: what soft tokens are to tell where that is not the answer: whether a picture shows a
            name is for the language model to say, as it does of descriptions.
    """

    question: str
    answer: str
    told: str = ""
    shown: str = ""


def _some(formats: Formats, *left_out: str) -> Formats:
    return {name: form for name, form in formats.items() if name not in left_out}


PICTURES: Mapping[type, Formats] = {
    Thing: _some(THING, "which"),
    Scene: _some(SCENE, "box", "stretch", "compare"),
    View: VIEW,
}
"""What a picture shows -> name of a format -> how often it is drawn, and what makes its turn."""
TEXTS: Formats = _some(FORMATS[Words], "option", "among")


def about_picture(about: Thing | Scene | View, count: int, draw: Random) -> list[Asked]:
    """Returns ``count`` questions about a picture, of different formats where enough fit."""
    formats = PICTURES[type(about)]
    found: list[Asked] = []
    while len(found) < count:
        names = sorted(formats, key=lambda name: draw.random() ** (1 / formats[name][0]))
        turns = (formats[name][1](about, draw) for name in reversed(names))
        for turn in turns:
            if turn is not None and not _letter(turn[1]):
                found.append(Asked(*turn, shown=_name(about) if turn[1] in ("yes", "no") else ""))
    return found[:count]


def _name(about: Thing | Scene | View) -> str:
    if isinstance(about, Scene):
        return ""
    return about.noun if isinstance(about, View) else about.name


def _letter(answer: str) -> bool:
    """Returns whether an answer is that of an option, which no stream of this model asks for."""
    return len(answer) == 1 and answer.isalpha()


def about_text(subjects: Subjects, draw: Random) -> Asked:
    """Returns a question about words alone."""
    names, weights = list(TEXTS), [weight for weight, _ in TEXTS.values()]
    while True:
        turn = TEXTS[draw.choices(names, weights)[0]][1](subjects.words(draw), draw)
        if turn is not None:
            return Asked(*turn)


def about_fact(draw: Random) -> Asked:
    """Returns a question about something described."""
    return Asked(*draw_fact(draw))
