"""Where the pictures of `mosaic/domains` come from: one function per domain, nothing drawn yet."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from evolora.errors import DataError
from evolora.streams.mosaic import render
from evolora.streams.mosaic.drawings import (
    draw_icon,
    emoji_drawings,
    emoji_table,
    flag_drawings,
    iconify_set,
)
from evolora.streams.mosaic.families import (
    EMOJI_SPLITS,
    FLAG_SPLITS,
    ICON_CONCEPTS,
    ICON_SPLITS,
    family_of,
    icon_base_name,
    split_letters,
)
from evolora.streams.mosaic.furniture import catalogue, mesh_noun, mesh_views
from evolora.streams.mosaic.sources import fetch

Size = Literal["compact", "large"]
SPLITS = ("train", "val", "test")
SEED = 2026

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_GARMENTS = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

# A domain is a source with its own look: emoji in a chat bubble, flags before a sky, icons on a
# dark tile, letters on a blackboard, furniture in a pink studio; the others bring their ground.
CHAT, SKY, TILE, BOARD, STUDIO = "#b0e09e", "#a0c8f0", "#4a145a", "#274c3c", (196, 160, 176)

_SNIPPETS = {"compact": (13, 3, 5), "large": (60, 10, 20)}


@dataclass(frozen=True)
class Sample:
    """One picture that can be drawn: what it shows, where it belongs, how to draw it."""

    name: str  # class name, as written in prompts
    split: str  # one of SPLITS
    family: str  # vendor, font family or object: what must not cross splits
    draw: Callable[[], Image.Image]


def _enlarged(pixels: Any, factor: int) -> Image.Image:
    """Returns a small grey picture enlarged by whole pixels and centered on black."""
    big = Image.fromarray(np.kron(pixels, np.ones((factor, factor), dtype=np.uint8)))
    canvas = Image.new("RGB", (render.IMAGE_SIZE, render.IMAGE_SIZE))
    offset = (render.IMAGE_SIZE - big.width) // 2
    canvas.paste(big.convert("RGB"), (offset, offset))
    return canvas


def digit_samples(cache: Path | None, size: Size) -> Iterator[Sample]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits need the package 'scikit-learn' (pip install it)") from error
    data = load_digits()
    order = list(range(len(data.target)))
    random.Random(SEED).shuffle(order)
    for position, index in enumerate(order):
        share = position / len(order)
        split = "train" if share < 0.65 else "val" if share < 0.75 else "test"
        pixels = np.minimum(data.images[index] * 16, 255).astype(np.uint8)
        yield Sample(_DIGITS[data.target[index]], split, "digits", partial(_enlarged, pixels, 8))


def garment_samples(cache: Path | None, size: Size) -> Iterator[Sample]:
    folder = fetch("fashion", cache) / "usr/share/datasets/fashion-mnist"
    for part in ("train", "t10k"):
        images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
        pixels = np.frombuffer(images, dtype=np.uint8, offset=16).reshape(-1, 28, 28)
        for index, label in enumerate(labels):
            # the official training part's last tenth serves as val
            late = index >= len(labels) * 9 // 10
            split = "test" if part == "t10k" else "val" if late else "train"
            draw = partial(_enlarged, pixels[index], 2)
            yield Sample(_GARMENTS[label], split, "fashion-mnist", draw)


def shape_facts(question: str, answer: str) -> set[str]:
    """Returns the color and shape words that one easy-VQA question and answer prove."""
    words = re.findall(r"[a-z]+", question.lower())
    if answer in ("yes", "no"):
        negated = "not" in words or "no" in words
        if (answer == "yes") == negated:
            return set()
        return {word for word in words if word in COLORS + SHAPES}
    return {word for word in [*words, answer] if word in COLORS + SHAPES}


def shape_samples(cache: Path | None, size: Size) -> Iterator[Sample]:
    root = fetch("easy-vqa", cache) / "easy_vqa" / "data"
    for part in ("train", "test"):
        facts: dict[int, set[str]] = defaultdict(set)
        for question, answer, image in json.loads((root / part / "questions.json").read_text()):
            facts[image] |= shape_facts(question, answer)
        for image, words in sorted(facts.items()):
            colors = [word for word in words if word in COLORS]
            shapes = [word for word in words if word in SHAPES]
            if len(colors) != 1 or len(shapes) != 1:
                continue
            split = "test" if part == "test" else "val" if image % 10 == 9 else "train"
            path = root / part / "images" / f"{image}.png"
            yield Sample(f"{colors[0]} {shapes[0]}", split, "easy-vqa", partial(open_square, path))


def open_square(path: Path) -> Image.Image:
    return render.pad_to_square(Image.open(path))


def drawn_on(board: str, draw: Callable[[], Image.Image]) -> Image.Image:
    return render.on_board(draw(), board)


def emoji_samples(groups: tuple[str, ...], cache: Path | None, size: Size) -> Iterator[Sample]:
    table = emoji_table(cache)
    for split, prefixes in EMOJI_SPLITS.items():
        for prefix in prefixes:
            icons = iconify_set(cache, prefix)
            for key, label in sorted(emoji_drawings(icons, table, groups).items()):
                draw = partial(draw_icon, icons, key, CHAT)
                yield Sample(label, split, family_of(prefix), draw)


def flag_samples(cache: Path | None, size: Size) -> Iterator[Sample]:
    countries = emoji_table(cache).countries
    for split, prefixes in FLAG_SPLITS.items():
        for prefix in prefixes:
            icons = iconify_set(cache, prefix)
            for key, country in sorted(flag_drawings(icons, countries).items()):
                draw = partial(draw_icon, icons, key, SKY)
                yield Sample(country, split, family_of(prefix), draw)


def icon_samples(cache: Path | None, size: Size) -> Iterator[Sample]:
    concepts = set(ICON_CONCEPTS)
    for split, prefixes in ICON_SPLITS.items():
        for prefix in prefixes:
            icons = iconify_set(cache, prefix)
            for key in sorted(icons["icons"]):
                concept = icon_base_name(key)
                if concept in concepts:
                    name = concept.replace("-", " ")
                    draw = partial(drawn_on, TILE, partial(draw_icon, icons, key))
                    yield Sample(name, split, family_of(prefix), draw)


def script_samples(cache: Path | None, size: Size) -> Iterator[Sample]:
    from evolora.streams.mosaic.scripts import scripts, snippets

    for script in scripts(cache):
        letters = split_letters(script.letters, SEED)
        for split, count in zip(SPLITS, _SNIPPETS[size], strict=True):
            seed = f"{script.name}/{split}"
            for draw in snippets(script.font, letters[split], count, seed):
                chalk = partial(drawn_on, BOARD, draw)
                yield Sample(script.name, split, f"{script.font.stem}", chalk)


def furniture_samples(cache: Path | None, size: Size) -> Iterator[Sample]:
    root = fetch("furniture", cache) / "usr/share/sweethome3d/furniture"
    objects: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for path in sorted(root.glob("*.sh3f")):
        for entry in catalogue(path):
            noun = mesh_noun(entry["name"])
            if noun:
                objects[noun].append((path, entry["model"].lstrip("/")))
    views = 4 if size == "compact" else 12
    for noun, members in sorted(objects.items()):
        random.Random(f"{SEED}/{noun}").shuffle(members)
        for index, (path, model) in enumerate(members):
            share = (index + 0.5) / len(members)
            split = "train" if share < 0.62 else "val" if share < 0.75 else "test"
            draws = mesh_views(path, model, views, STUDIO)
            for draw in draws:
                yield Sample(noun, split, path.stem, draw)
