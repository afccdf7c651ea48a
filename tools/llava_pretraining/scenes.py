"""Simple scenes: a few colored shapes on a plain ground, and what is asked about them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from clip_pretraining.config import IMAGE_SIZE

COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 215, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "purple": (130, 50, 170),
    "pink": (245, 140, 190),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
GROUNDS = ("white", "white", "white", "black", "yellow", "pink", "green", "blue")


def _star() -> tuple[tuple[float, float], ...]:
    """Returns the ten corners of a star that fills the unit square."""
    corners = [
        (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
        for k, r in enumerate((1, 0.4) * 5)
    ]
    low = [min(corner[axis] for corner in corners) for axis in (0, 1)]
    high = [max(corner[axis] for corner in corners) for axis in (0, 1)]
    return tuple(
        ((x - low[0]) / (high[0] - low[0]), (y - low[1]) / (high[1] - low[1])) for x, y in corners
    )


JITTER = 18  # of a color's parts
STRETCHED = 1.3  # a shape so much longer one way is called wider or taller
POLYGONS = {
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "cross": (
        *((0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67)),
        *((0.67, 1), (0.33, 1), (0.33, 0.67), (0, 0.67), (0, 0.33), (0.33, 0.33)),
    ),
    "arrow": ((0, 0.3), (0.5, 0.3), (0.5, 0), (1, 0.5), (0.5, 1), (0.5, 0.7), (0, 0.7)),
    "star": _star(),
}
EVEN = ("circle", "ring", "square", "star")  # never stretched
SHAPES = ("circle", "ring", "square", "oval", "bar", *POLYGONS)


@dataclass(frozen=True)
class Item:
    """A shape of a scene; its box (left, top, right, bottom) is in pixels."""

    shape: str
    color: str
    box: tuple[int, int, int, int]

    @property
    def width(self) -> int:
        """Returns its width in pixels."""
        return self.box[2] - self.box[0]

    @property
    def height(self) -> int:
        """Returns its height in pixels."""
        return self.box[3] - self.box[1]

    @property
    def center(self) -> tuple[float, float]:
        """Returns the middle of its box (x, y)."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def stretch(self) -> str:
        """Returns "wider", "taller", or nothing where it is neither."""
        if self.width >= STRETCHED * self.height:
            return "wider"
        return "taller" if self.height >= STRETCHED * self.width else ""


@dataclass(frozen=True)
class Scene:
    """Items that do not touch each other, from left to right by their centers."""

    ground: str
    items: tuple[Item, ...]


def draw_scene(draw: Random) -> Scene:
    """Returns a scene of one to six items; with more than three they are of one kind."""
    ground = draw.choice(GROUNDS)
    colors = [color for color in COLORS if color != ground]
    count = draw.choice((1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6))
    alike = count > 3 or draw.random() < 0.15
    kind = draw.choice(SHAPES), draw.choice(colors)
    longest = {1: 50, 2: 34, 3: 28}.get(count, 20)
    items: list[Item] = []
    for _ in range(60):
        if len(items) == count:
            break
        shape, color = kind if alike else (draw.choice(SHAPES), draw.choice(colors))
        box = _box(shape, longest, draw)
        if not any(_touch(box, item.box) for item in items):
            items.append(Item(shape, color, box))
    return Scene(ground, tuple(sorted(items, key=lambda item: item.center)))


def _box(shape: str, longest: int, draw: Random) -> tuple[int, int, int, int]:
    side = draw.randint(longest // 2, longest)
    other = side
    if shape in ("oval", "bar"):
        other = max(4, round(side * draw.uniform(0.3, 0.65)))
    elif shape not in EVEN and draw.random() < 0.6:
        other = round(side * draw.uniform(0.5, 1))
    width, height = (side, other) if draw.random() < 0.5 else (other, side)
    left = draw.randint(1, IMAGE_SIZE - 2 - width)
    top = draw.randint(1, IMAGE_SIZE - 2 - height)
    return left, top, left + width, top + height


def _touch(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return min(a[2], b[2]) + 2 > max(a[0], b[0]) and min(a[3], b[3]) + 2 > max(a[1], b[1])


def picture(scene: Scene, draw: Random) -> Tensor:
    """Returns the picture of a scene, uint8 [64, 64, 3]; colors vary a little."""

    def tint(color: str) -> tuple[int, ...]:
        return tuple(
            min(255, max(0, part + draw.randint(-JITTER, JITTER))) for part in COLORS[color]
        )

    ground = tint(scene.ground)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), ground)
    pen = ImageDraw.Draw(image)
    for item in scene.items:
        left, top, _, _ = item.box
        ink = tint(item.color)
        if item.shape in ("circle", "oval", "ring"):
            pen.ellipse(item.box, fill=ink)
            if item.shape == "ring":
                gap = max(2, item.width // 4)
                inner = (left + gap, top + gap, item.box[2] - gap, item.box[3] - gap)
                pen.ellipse(inner, fill=ground)
        elif item.shape in POLYGONS:
            corners = POLYGONS[item.shape]
            pen.polygon(
                [(left + x * item.width, top + y * item.height) for x, y in corners], fill=ink
            )
        else:
            pen.rectangle(item.box, fill=ink)
    return torch.from_numpy(np.asarray(image).copy())
