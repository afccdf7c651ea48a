"""Builds `mosaic/domains`: nine kinds of picture, classified by class name, from real drawings.

Pictures come from registry packages (`sources`), drawn at 64x64 (`render`). Where a class is drawn
by several vendors, whole vendor families go to train, to val, to test or to the pretraining corpus
of the embedded backbone, never to two of them: a random split lets a pixel comparison score 72 % on
animals, a family split 26 %.

Everything is decided by the tables below and a seed; two builds from the same packages are equal.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
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
from evolora.streams.mosaic.licenses import license_text
from evolora.streams.mosaic.sources import fetch

Size = Literal["compact", "large"]
Progress = Callable[[str], None]
SPLITS = ("train", "val", "test")
SEED = 2026
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Sample:
    """One picture that can be drawn: what it shows, where it belongs, how to draw it."""

    name: str  # class name, as written in prompts
    split: str  # one of SPLITS
    family: str  # vendor, font family or object: what must not cross splits
    draw: Callable[[], Image.Image]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One row of the suite."""

    name: str
    title: str
    templates: tuple[str, ...]
    licence: str
    source: str
    split_rule: str
    collect: Callable[[Path | None, Size], Iterator[Sample]]
    caps: tuple[int, int, int] = (1500, 300, 500)  # compact: images in train, val, test


# --- small sets with splits of their own -----------------------------------------------------

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
_COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
_SHAPES = ("circle", "rectangle", "triangle")


def _enlarged(pixels: Any, factor: int) -> Image.Image:
    """Returns a small grey picture enlarged by whole pixels and centered on black."""
    big = Image.fromarray(np.kron(pixels, np.ones((factor, factor), dtype=np.uint8)))
    canvas = Image.new("RGB", (render.IMAGE_SIZE, render.IMAGE_SIZE))
    offset = (render.IMAGE_SIZE - big.width) // 2
    canvas.paste(big.convert("RGB"), (offset, offset))
    return canvas


def _digits(cache: Path | None, size: Size) -> Iterator[Sample]:
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


def _fashion(cache: Path | None, size: Size) -> Iterator[Sample]:
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
        return {word for word in words if word in _COLORS + _SHAPES}
    return {word for word in [*words, answer] if word in _COLORS + _SHAPES}


def _shapes(cache: Path | None, size: Size) -> Iterator[Sample]:
    root = fetch("easy-vqa", cache) / "easy_vqa" / "data"
    for part in ("train", "test"):
        facts: dict[int, set[str]] = defaultdict(set)
        for question, answer, image in json.loads((root / part / "questions.json").read_text()):
            facts[image] |= shape_facts(question, answer)
        for image, words in sorted(facts.items()):
            colors = [word for word in words if word in _COLORS]
            shapes = [word for word in words if word in _SHAPES]
            if len(colors) != 1 or len(shapes) != 1:
                continue
            split = "test" if part == "test" else "val" if image % 10 == 9 else "train"
            path = root / part / "images" / f"{image}.png"
            yield Sample(f"{colors[0]} {shapes[0]}", split, "easy-vqa", partial(open_square, path))


def open_square(path: Path) -> Image.Image:
    return render.pad_to_square(Image.open(path))


# A domain is a source with its own look: emoji in a chat bubble, flags before a sky, icons on a
# dark tile, letters on a blackboard, furniture in a pink studio; the others bring their ground.
CHAT, SKY, TILE, BOARD, STUDIO = "#b0e09e", "#a0c8f0", "#4a145a", "#274c3c", (196, 160, 176)


def _drawn_on(board: str, draw: Callable[[], Image.Image]) -> Image.Image:
    return render.on_board(draw(), board)


# --- drawings of the Iconify sets ------------------------------------------------------------


def _emoji(groups: tuple[str, ...], cache: Path | None, size: Size) -> Iterator[Sample]:
    table = emoji_table(cache)
    for split, prefixes in EMOJI_SPLITS.items():
        for prefix in prefixes:
            icons = iconify_set(cache, prefix)
            for key, label in sorted(emoji_drawings(icons, table, groups).items()):
                draw = partial(draw_icon, icons, key, CHAT)
                yield Sample(label, split, family_of(prefix), draw)


def _flags(cache: Path | None, size: Size) -> Iterator[Sample]:
    countries = emoji_table(cache).countries
    for split, prefixes in FLAG_SPLITS.items():
        for prefix in prefixes:
            icons = iconify_set(cache, prefix)
            for key, country in sorted(flag_drawings(icons, countries).items()):
                draw = partial(draw_icon, icons, key, SKY)
                yield Sample(country, split, family_of(prefix), draw)


def _icons(cache: Path | None, size: Size) -> Iterator[Sample]:
    concepts = set(ICON_CONCEPTS)
    for split, prefixes in ICON_SPLITS.items():
        for prefix in prefixes:
            icons = iconify_set(cache, prefix)
            for key in sorted(icons["icons"]):
                concept = icon_base_name(key)
                if concept in concepts:
                    name = concept.replace("-", " ")
                    draw = partial(_drawn_on, TILE, partial(draw_icon, icons, key))
                    yield Sample(name, split, family_of(prefix), draw)


# --- scripts ---------------------------------------------------------------------------------

_SNIPPETS = {"compact": (13, 3, 5), "large": (60, 10, 20)}


def _scripts(cache: Path | None, size: Size) -> Iterator[Sample]:
    from evolora.streams.mosaic.scripts import scripts, snippets

    for script in scripts(cache):
        letters = split_letters(script.letters, SEED)
        for split, count in zip(SPLITS, _SNIPPETS[size], strict=True):
            seed = f"{script.name}/{split}"
            for draw in snippets(script.font, letters[split], count, seed):
                chalk = partial(_drawn_on, BOARD, draw)
                yield Sample(script.name, split, f"{script.font.stem}", chalk)


# --- furniture -------------------------------------------------------------------------------


def _furniture(cache: Path | None, size: Size) -> Iterator[Sample]:
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


# --- the table -------------------------------------------------------------------------------

_VENDORS = "whole vendor families: train noto, twemoji; val fxemoji; test emojione"
_EMOJI_LICENCE = "Apache-2.0 (noto, fxemoji), CC-BY-4.0 (twemoji, emojione)"

DOMAINS: tuple[Domain, ...] = (
    Domain(
        name="digits",
        title="Handwritten digits",
        templates=("the digit {}", "a handwritten digit {}", "a blurry number {}"),
        licence="CC-BY-4.0 (UCI optical recognition of handwritten digits)",
        source="PyPI scikit-learn, load_digits",
        split_rule="random 65/10/25 by seed",
        collect=_digits,
    ),
    Domain(
        name="fashion",
        title="Garments",
        templates=("a photo of a {}", "a gray photo of a {}", "a picture of clothing: {}"),
        licence="MIT",
        source="Debian dataset-fashion-mnist",
        split_rule="official; val is the last tenth of the official training part",
        collect=_fashion,
        caps=(1000, 200, 400),
    ),
    Domain(
        name="shapes",
        title="Colored shapes",
        templates=("a {}", "a picture of a {}", "one {} on a plain background"),
        licence="MIT",
        source="PyPI easy-vqa",
        split_rule="official; val is every tenth image of the official training part",
        collect=_shapes,
    ),
    Domain(
        name="emoji",
        title="Emoji of animals, nature, food and faces",
        templates=("an emoji of a {}", "a drawing of a {}", "a colorful cartoon of a {}"),
        licence=_EMOJI_LICENCE,
        source="npm @iconify/json",
        split_rule=_VENDORS,
        collect=partial(_emoji, ("animals-nature", "food-drink", "smileys-emotion")),
    ),
    Domain(
        name="flags",
        title="Flags of countries",
        templates=("the flag of {}", "a drawing of the flag of {}", "the national flag: {}"),
        licence="MIT (circle-flags, flagpack), CC0-1.0 (cif), CC-BY-4.0 (twemoji, emojione)",
        source="npm @iconify/json",
        split_rule="whole sets: train twemoji, circle-flags; val cif; test flagpack, emojione",
        collect=_flags,
    ),
    Domain(
        name="icons",
        title="User-interface icons",
        templates=("an icon of {}", "a white icon: {}", "a user interface symbol for {}"),
        licence="MIT, Apache-2.0, ISC, CC-BY-4.0, CC0-1.0, OFL-1.1, Unlicense; see LICENSES.md",
        source="npm @iconify/json",
        split_rule="whole families of icon sets",
        collect=_icons,
        caps=(1500, 300, 480),
    ),
    Domain(
        name="scripts",
        title="Writing systems",
        templates=("text in the {} script", "letters of the {} alphabet", "{} writing"),
        licence="OFL-1.1",
        source="Debian fonts-noto-core",
        split_rule="disjoint letters per script: 60/15/25",
        collect=_scripts,
        caps=(1500, 300, 500),
    ),
    Domain(
        name="furniture",
        title="Rendered furniture",
        templates=("a 3D render of a {}", "a rendered model of a {}", "a shaded picture of a {}"),
        licence="CC0-1.0, CC-BY-3.0 (see LICENSES.md for the authors)",
        source="Debian sweethome3d-furniture",
        split_rule="by object, 62/13/25 per class; all views of an object stay together",
        collect=_furniture,
        caps=(900, 200, 400),
    ),
)


# --- selection and writing -------------------------------------------------------------------


def keep_usable(samples: Iterable[Sample]) -> list[Sample]:
    """Returns the samples of the classes that have at least two train and one test picture."""
    by_class: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    kept = list(samples)
    for sample in kept:
        by_class[sample.name][sample.split] += 1
    usable = {n for n, counts in by_class.items() if counts["train"] >= 2 and counts["test"] >= 1}
    return [sample for sample in kept if sample.name in usable]


def balanced(samples: Sequence[Sample], cap: int | None, seed: str) -> list[Sample]:
    """Returns at most `cap` samples, shuffled, taking turns among classes, then among families."""
    order = list(samples)
    random.Random(seed).shuffle(order)
    if cap is None or len(order) <= cap:
        return order
    turn: dict[int, tuple[int, int]] = {}
    per_class: dict[str, int] = defaultdict(int)
    per_family: dict[tuple[str, str], int] = defaultdict(int)
    for index, sample in enumerate(order):
        per_family[sample.name, sample.family] += 1
        turn[index] = (per_family[sample.name, sample.family], index)
    ranked = sorted(range(len(order)), key=turn.__getitem__)
    place = {}
    for index in ranked:
        per_class[order[index].name] += 1
        place[index] = (per_class[order[index].name], turn[index])
    chosen = sorted(range(len(order)), key=place.__getitem__)[:cap]
    return [order[index] for index in sorted(chosen)]


def encode(image: Image.Image) -> bytes:
    """Returns the picture as lossless WebP or PNG, whichever is smaller."""
    webp, png = io.BytesIO(), io.BytesIO()
    image.save(webp, "WEBP", lossless=True, quality=80, method=4)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    exact = np.array_equal(np.asarray(palette.convert("RGB")), np.asarray(image))
    (palette if exact else image).save(png, "PNG", optimize=True)
    return min(webp.getvalue(), png.getvalue(), key=len)


def build(
    out: Path, size: Size, cache: Path | None = None, progress: Progress | None = None
) -> Path:
    """Writes `domains.safetensors` and `domains.json` into `out`; returns the JSON's path.

    Args:
        out: folder, made if missing.
        size: "compact" (capped, as embedded in the package) or "large" (everything).
        cache: folder of the registry packages; see `sources.fetch`.
        progress: called with one line per domain.
    """
    from safetensors.numpy import save

    if size not in ("compact", "large"):
        raise DataError(f"size is {size!r}; allowed: 'compact', 'large'")
    drawn = _Drawn()
    rows = []
    for number, domain in enumerate(DOMAINS):
        samples = keep_usable(domain.collect(cache, size))
        classes = sorted({sample.name for sample in samples})
        for split, most in zip(SPLITS, domain.caps, strict=True):
            cap = most if size == "compact" else None
            part = [sample for sample in samples if sample.split == split]
            for sample in balanced(part, cap, f"{SEED}/{domain.name}/{split}"):
                drawn.add(sample, number, classes.index(sample.name))
        rows.append(_describe(domain, classes))
        if progress:
            progress(f"{domain.name}: {len(classes)} classes, {len(drawn.files)} images so far")
    manifest = {"size": size, "domains": rows, "families": drawn.families}
    terms = license_text(((d.name, d.source, d.licence) for d in DOMAINS), cache)
    return _write(out, save(drawn.tensors()), manifest, terms)


class _Drawn:
    """The pictures drawn so far, as the columns of the file."""

    def __init__(self) -> None:
        self.files: list[bytes] = []
        self.families: list[str] = []
        self.columns: dict[str, list[int]] = {"domain": [], "label": [], "split": [], "family": []}

    def add(self, sample: Sample, domain: int, label: int) -> None:
        """Draws and encodes one sample."""
        if sample.family not in self.families:
            self.families.append(sample.family)
        self.files.append(encode(sample.draw()))
        self.columns["domain"].append(domain)
        self.columns["label"].append(label)
        self.columns["split"].append(SPLITS.index(sample.split))
        self.columns["family"].append(self.families.index(sample.family))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Returns the content of `domains.safetensors`."""
        return {
            "bytes": np.frombuffer(b"".join(self.files), dtype=np.uint8),
            "offsets": np.cumsum([0, *map(len, self.files)], dtype=np.int64),
            "domain": np.asarray(self.columns["domain"], dtype=np.uint8),
            "label": np.asarray(self.columns["label"], dtype=np.int16),
            "split": np.asarray(self.columns["split"], dtype=np.uint8),
            "family": np.asarray(self.columns["family"], dtype=np.int16),
        }


def _describe(domain: Domain, classes: list[str]) -> dict[str, Any]:
    return {
        "name": domain.name,
        "title": domain.title,
        "classes": classes,
        "templates": list(domain.templates),
        "license": domain.licence,
        "source": domain.source,
        "split_rule": domain.split_rule,
    }


def _write(out: Path, data: bytes, manifest: dict[str, Any], licenses: str) -> Path:
    """Writes the three files by temp + rename, the manifest last."""
    out.mkdir(parents=True, exist_ok=True)
    head = {
        "format_version": FORMAT_VERSION,
        "name": "mosaic/domains",
        "image_size": render.IMAGE_SIZE,
        "seed": SEED,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    text = json.dumps({**head, **manifest}, ensure_ascii=False, indent=1) + "\n"
    files = {
        "domains.safetensors": data,
        "LICENSES.md": licenses.encode(),
        "domains.json": text.encode(),
    }
    for name, content in files.items():
        temporary = out / f".{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, out / name)
    return out / "domains.json"
