"""Composes scenes of two things with a known place each, and names the color of a drawing."""

from __future__ import annotations

import colorsys
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from evolora.streams.mosaic import render

STEP, SIDE = 16, 32  # pixels: things are as wide as half the scene and stand on a grid
GROUNDS = ("#ffffff", "#f4e8c8", "#dce8f8", "#e4f4dc", "#f4dce4")
LARGEST = 1000  # coordinates of boxes are thousandths of the scene

_HUES = (
    *((15, "red"), (45, "orange"), (70, "yellow"), (165, "green"), (260, "blue")),
    *((320, "purple"), (361, "red")),
)  # degrees at which a color ends
_CLEAR = 0.5  # share of the ink that one color must have to give its name to the drawing

Place = tuple[int, int]


@dataclass(frozen=True)
class Thing:
    """A drawing that can stand in a scene."""

    noun: str
    icons: dict[str, Any]
    key: str


def places(rng: random.Random) -> tuple[Place, Place]:
    """Returns the left upper corners, in pixels, of two things that do not overlap."""
    grid = [(x, y) for x in range(0, 64 - SIDE + 1, STEP) for y in range(0, 64 - SIDE + 1, STEP)]
    pairs = [(one, two) for one in grid for two in grid if _apart(one, two)]
    return rng.choice(pairs)


def _apart(one: Place, two: Place) -> bool:
    return any(abs(a - b) >= SIDE for a, b in zip(one, two, strict=True))


def box_of(place: Place) -> str:
    """Returns the box of a thing as an answer, "[0, 250, 500, 750]"."""
    corners = (*place, place[0] + SIDE, place[1] + SIDE)
    return f"[{', '.join(str(round(c * LARGEST / render.IMAGE_SIZE)) for c in corners)}]"


def draw_scene(things: Sequence[tuple[Thing, Place]], ground: str) -> Image.Image:
    scene = Image.new("RGB", (render.IMAGE_SIZE, render.IMAGE_SIZE), ground)
    for thing, place in things:
        svg = render.icon_svg(thing.icons, thing.key)
        scene.paste(render.render_svg(svg, SIDE, ground), place)
    return scene


def shifted(draw: Callable[[], Image.Image], ground: str, seed: str) -> Image.Image:
    """Returns a drawing smaller by up to a third, somewhere on the ground."""
    rng = random.Random(seed)
    side = rng.randint(render.IMAGE_SIZE * 2 // 3, render.IMAGE_SIZE)
    scene = Image.new("RGB", (render.IMAGE_SIZE, render.IMAGE_SIZE), ground)
    room = render.IMAGE_SIZE - side
    place = (rng.randint(0, room), rng.randint(0, room))
    scene.paste(draw().resize((side, side), Image.Resampling.LANCZOS), place)
    return scene


def color_name(image: Image.Image) -> str:
    """Returns the color of most of a drawing's ink, or "colorful" where none has half of it.

    Ink is what differs from the color of the left upper corner.
    """
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    ink = pixels[np.abs(pixels.astype(int) - pixels[0]).sum(axis=1) > 60]
    if not len(ink):
        return "white"
    values, counts = np.unique(ink // 8 * 8 + 4, axis=0, return_counts=True)
    share: Counter[str] = Counter()
    for color, count in zip(values.tolist(), counts.tolist(), strict=True):
        share[_name(color)] += count
    name, most = share.most_common(1)[0]
    return name if most >= _CLEAR * len(ink) else "colorful"


def _name(color: Sequence[int]) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
    if value < 0.25:
        return "black"
    if saturation < 0.2:
        return "white" if value > 0.85 else "gray"
    name = next(name for end, name in _HUES if hue * 360 < end)
    return "brown" if name in ("red", "orange") and value < 0.6 and hue * 360 < 50 else name
