"""What is asked and answered about scenes: colors, numbers, places, sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from clip_pretraining.config import IMAGE_SIZE
from llava_pretraining.forms import NUMBERS, Turn, article, options, yes_no
from llava_pretraining.scenes import COLORS, SHAPES, Item, Scene

GRID = 1000  # boxes are given on this scale


def _unique(scene: Scene, draw: Random) -> tuple[Item, str] | None:
    """Returns an item and words that mean no other of the scene."""
    shapes = [item.shape for item in scene.items]
    kinds = [(item.shape, item.color) for item in scene.items]
    found = [item for item in scene.items if kinds.count((item.shape, item.color)) == 1]
    if not found:
        return None
    item = draw.choice(found)
    short = shapes.count(item.shape) == 1 and draw.random() < 0.5
    return item, f"the {item.shape}" if short else f"the {item.color} {item.shape}"


def _color(scene: Scene, draw: Random) -> Turn | None:
    shapes = [item.shape for item in scene.items]
    found = [item for item in scene.items if shapes.count(item.shape) == 1]
    if not found:
        return None
    item = draw.choice(found)
    asks = ["What color is the {}?", "Name the color of the {}.", "Which color has the {}?"]
    if len(scene.items) == 1:
        asks += ["What color is it?", "What is the color of the shape?"]
    question = draw.choice(asks).format(item.shape)
    if draw.random() < 0.25:
        return options(question, item.color, list(COLORS), draw)
    return question, item.color


def _shape(scene: Scene, draw: Random) -> Turn | None:
    colors = [item.color for item in scene.items]
    found = [item for item in scene.items if colors.count(item.color) == 1]
    if not found:
        return None
    item = draw.choice(found)
    asks = ["Which shape is {}?", "What is the {} shape called?", "Name the {} shape."]
    if len(scene.items) == 1:
        asks += ["Which shape is it?", "What shape is shown?"]
    question = draw.choice(asks).format(item.color)
    if draw.random() < 0.25:
        return options(question, item.shape, SHAPES, draw)
    return question, item.shape


def _count(scene: Scene, draw: Random) -> Turn:
    asks = ("How many shapes are there?", "Count the shapes.", "How many things are drawn?")
    number = len(scene.items)
    kind = draw.random()
    if kind < 0.6:
        return draw.choice(asks), str(number)
    if kind < 0.8:
        return f"{draw.choice(asks)} Answer with a word.", NUMBERS[number - 1]
    return options(draw.choice(asks), str(number), ["1", "2", "3", "4", "5", "6"], draw)


def _there(scene: Scene, draw: Random) -> Turn:
    item = draw.choice(scene.items)
    drawn = {(one.shape, one.color) for one in scene.items}
    wrong = [(shape, item.color) for shape in SHAPES] + [(item.shape, color) for color in COLORS]
    shape, color = draw.choice([pair for pair in wrong if pair not in drawn])
    form = draw.choice(("Is there {}?", "Do you see {}?", "Does it show {}?"))
    true, false = article(f"{item.color} {item.shape}"), article(f"{color} {shape}")
    return yes_no((form.format(true), form.format(false)), draw)


def _box(scene: Scene, draw: Random) -> Turn | None:
    found = _unique(scene, draw)
    if found is None:
        return None
    item, words = found
    asks = (
        *("Where is {}? Give its box.", "Give the bounding box of {}.", "Box of {}?"),
        "Locate {} as [left, top, right, bottom].",
    )
    box = ", ".join(str(round(GRID * side / IMAGE_SIZE)) for side in item.box)
    return draw.choice(asks).format(words), f"[{box}]"


def _side(scene: Scene, draw: Random) -> Turn | None:
    found = _unique(scene, draw)
    if found is None:
        return None
    (x, y), words = found[0].center, found[1]
    axis = draw.random() < 0.5
    place, (low, high) = (x, ("left", "right")) if axis else (y, ("top", "bottom"))
    if abs(place - IMAGE_SIZE / 2) < 4:
        return None
    half = low if place < IMAGE_SIZE / 2 else high
    if draw.random() < 0.5:
        asks = ("Is {} on the {} or on the {}?", "On which side is {}, {} or {}?")
        return draw.choice(asks).format(words, low, high), half
    form = f"Is {words} in the {{}} half?"
    other = high if half == low else low
    return yes_no((form.format(half), form.format(other)), draw)


def _stretch(scene: Scene, draw: Random) -> Turn | None:
    found = _unique(scene, draw)
    if found is None or not found[0].stretch:
        return None
    answer, words = found[0].stretch, found[1]
    if draw.random() < 0.5:
        asks = ("Is {} wider or taller?", "What is {}, taller or wider?")
        return draw.choice(asks).format(words), answer
    forms = {"wider": "Is {} wider than high?", "taller": "Is {} higher than wide?"}
    true, false = (forms[way].format(words) for way in sorted(forms, key=lambda way: way != answer))
    return yes_no((true, false), draw)


def _compare(scene: Scene, draw: Random) -> Turn | None:
    kinds = [(item.shape, item.color) for item in scene.items]
    found = [item for item in scene.items if kinds.count((item.shape, item.color)) == 1]
    if len(found) < 2:
        return None
    one, two = draw.sample(found, 2)
    first, second = (f"the {item.color} {item.shape}" for item in (one, two))
    areas = one.width * one.height, two.width * two.height
    if draw.random() < 0.5 and max(areas) > 1.4 * min(areas):
        larger = first if areas[0] > areas[1] else second
        return f"Which is larger, {first} or {second}?", larger
    gap = one.center[0] - two.center[0]
    if abs(gap) < 4:
        return None
    words = (first, second) if gap < 0 else (second, first)
    form = draw.choice(("Is {} left of {}?", "Is {} to the left of {}?"))
    return yes_no((form.format(*words), form.format(*reversed(words))), draw)


def _scene_caption(scene: Scene, draw: Random) -> Turn | None:
    if len(scene.items) > 3:
        return None
    parts = [article(f"{item.color} {item.shape}") for item in scene.items]
    text = " and ".join(parts)
    asks = ("Describe the scene.", "What is drawn, from left to right?", "Describe the shapes.")
    ground = (
        "Describe the scene and its background.",
        f"{text[0].upper()}{text[1:]} on {scene.ground}.",
    )
    return ground if draw.random() < 0.3 else (draw.choice(asks), f"{text[0].upper()}{text[1:]}.")


def _ground(scene: Scene, draw: Random) -> Turn:
    asks = ("What color is the background?", "Name the background color.", "On which color is it?")
    return draw.choice(asks), scene.ground


SCENE: Mapping[str, tuple[float, Callable[[Scene, Random], Turn | None]]] = {
    "color": (2, _color),
    "shape": (2, _shape),
    "count": (2, _count),
    "there": (2, _there),
    "box": (2, _box),
    "side": (1.5, _side),
    "stretch": (1.5, _stretch),
    "compare": (1.5, _compare),
    "scene": (1.5, _scene_caption),
    "ground": (0.7, _ground),
}
