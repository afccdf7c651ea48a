"""What is asked and answered about painted drawings and objects, in the words of the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from evolora.streams.mosaic.instruction_words import with_article
from evolora.streams.mosaic.modality_words import ANSWERS, WORDINGS, image_captions
from llava_pretraining.forms import Turn

NAMED = ("what", "sound", "emoji", "motion")
"""Kinds of question whose answer is what a view shows."""


@dataclass(frozen=True)
class View:
    """What a picture shows.

    Args:
        noun: an answer of the kind.
        kind: of question that asks for it: one of `NAMED`.
        color: it is painted in, or None.
        shape: "tall", "wide", "even", or None where none is told.
    """

    noun: str
    kind: str
    color: str | None = None
    shape: str | None = None


def _name(view: View, draw: Random) -> Turn:
    return draw.choice(WORDINGS[view.kind]), view.noun


def _color(view: View, draw: Random) -> Turn | None:
    return None if view.color is None else (draw.choice(WORDINGS["color"]), view.color)


def _shape(view: View, draw: Random) -> Turn | None:
    return None if view.shape is None else (draw.choice(WORDINGS["shape"]), view.shape)


def is_it(noun: str, kind: str, draw: Random) -> Turn:
    """Returns whether it is the noun, or another answer of the kind."""
    others = [one for one in ANSWERS[kind] if one != noun]
    form = draw.choice(WORDINGS["is-it"])
    claims = (form.format(with_article(one)) for one in (noun, draw.choice(others)))
    wrong = draw.random() < 0.5
    return tuple(claims)[wrong], "no" if wrong else "yes"


def _is_it(view: View, draw: Random) -> Turn | None:
    return is_it(view.noun, view.kind, draw) if view.kind in ("what", "sound") else None


def _caption(view: View, draw: Random) -> Turn | None:
    if view.kind not in ("what", "sound") or view.color is None:
        return None
    return draw.choice(WORDINGS["caption"]), image_captions(view.noun, view.color)[0]


VIEW: Mapping[str, tuple[float, Callable[[View, Random], Turn | None]]] = {
    "view": (4, _name),
    "view color": (1.5, _color),
    "view shape": (1.5, _shape),
    "is it shown": (1.5, _is_it),
    "view caption": (1.5, _caption),
}
