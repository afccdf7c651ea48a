"""Which formats there are, by what is asked about, and how the turns of a dialogue are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from llava_pretraining.about_scenes import SCENE
from llava_pretraining.about_texts import TEXT, Words
from llava_pretraining.about_things import THING, Thing
from llava_pretraining.forms import Turn
from llava_pretraining.scenes import Scene

FORMATS: Mapping[type, Mapping[str, tuple[float, Callable[..., Turn | None]]]] = {
    Thing: THING,
    Scene: SCENE,
    Words: TEXT,
}
"""What is asked about -> name of a format -> how often it is drawn, and what makes its turn."""


def turns(about: Thing | Scene | Words, count: int, draw: Random) -> list[Turn]:
    """Returns up to ``count`` turns in different formats; formats that do not fit are left out."""
    formats = FORMATS[type(about)]
    names = sorted(formats, key=lambda name: draw.random() ** (1 / formats[name][0]), reverse=True)
    found = (formats[name][1](about, draw) for name in names)
    return [turn for turn in found if turn is not None][:count]
