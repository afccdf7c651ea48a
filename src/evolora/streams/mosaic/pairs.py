"""Where the pairs of `mosaic/missing` come from: a drawing and its keywords, nothing drawn yet.

Train, val and test share no object: all drawings of one emoji, of one icon's name, of one piece
of furniture are on one side, whoever drew them, and so are their keywords.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from evolora.errors import DataError
from evolora.streams.mosaic import render
from evolora.streams.mosaic.drawings import (
    draw_icon,
    emoji_drawings,
    emoji_table,
    iconify_set,
)
from evolora.streams.mosaic.families import (
    EMOJI_SPLITS,
    ICON_SPLITS,
    family_of,
    icon_base_name,
)
from evolora.streams.mosaic.furniture import catalogue, mesh_views
from evolora.streams.mosaic.keywords import clip_art_keywords, emoji_keywords, icon_keywords
from evolora.streams.mosaic.samples import SEED, Sample, Size
from evolora.streams.mosaic.sources import fetch

MAX_PER_SET = 2  # drawings of one icon name in one set: outlined and filled
_SHARES = (0.65, 0.75)  # where train and val end
_CLIP_ART_TRIED = 250  # files of a folder that the compact size draws


@dataclass(frozen=True)
class Pair(Sample):
    """One picture and its keywords; `name` is the label by which caps take turns."""

    labels: tuple[str, ...]
    words: tuple[str, ...]  # all that the source gives, those that name a label too
    object: str  # what must not cross splits
    key: str  # tells apart the pictures of one object


def sides(objects: Iterable[str], purpose: str) -> dict[str, str]:
    """Returns object -> split, in random order by seed."""
    order = sorted(set(objects))
    random.Random(f"{SEED}/{purpose}").shuffle(order)
    found = {}
    for index, each in enumerate(order):
        share = (index + 0.5) / len(order)
        found[each] = "train" if share < _SHARES[0] else "val" if share < _SHARES[1] else "test"
    return found


def emoji_pairs(
    group: str, classes: Mapping[str, tuple[str, ...]], cache: Path | None, size: Size
) -> Iterator[Pair]:
    """Yields emoji of one group of emojibase; `classes` maps a class to its subgroups."""
    table, known = emoji_table(cache), emoji_keywords(cache)
    class_of = {subgroup: name for name, parts in classes.items() for subgroup in parts}
    members: dict[str, list[str]] = defaultdict(list)
    for label, (subgroup, _) in known.items():
        if subgroup in class_of:
            members[class_of[subgroup]].append(label)
    side = {k: v for name, own in members.items() for k, v in sides(own, name).items()}
    for prefix in (prefix for group in EMOJI_SPLITS.values() for prefix in group):
        icons = iconify_set(cache, prefix)
        for key, label in sorted(emoji_drawings(icons, table, (group,)).items()):
            if label not in side:
                continue
            subgroup, words = known[label]
            name, draw = class_of[subgroup], partial(draw_icon, icons, key)
            family = family_of(prefix)
            yield Pair(name, side[label], family, draw, (name,), words, label, f"{prefix}/{key}")


def furniture_pairs(classes: Mapping[str, str], cache: Path | None, size: Size) -> Iterator[Pair]:
    """Yields two views of each piece of furniture, eight of the large size.

    `classes` maps a class to the catalogues' category.
    """
    root = fetch("furniture", cache) / "usr/share/sweethome3d/furniture"
    class_of = {category: name for name, category in classes.items()}
    members: dict[str, list[tuple[Path, dict[str, str]]]] = defaultdict(list)
    for path in sorted(root.glob("*.sh3f")):
        for entry in catalogue(path):
            if entry["category"] in class_of:
                members[class_of[entry["category"]]].append((path, entry))
    side: dict[str, str] = {}
    for name, own in members.items():
        # a bench of the kitchen and one of the garden stay together
        side |= sides({_model_name(entry) for _, entry in own} - set(side), name)
        for path, entry in own:
            thing, model = _model_name(entry), entry["model"].lstrip("/")
            words = (thing, *entry.get("tags", "").replace("Blend Swap", "").split(","))
            for view, draw in enumerate(mesh_views(path, model, 2 if size == "compact" else 8)):
                key = f"{model}/{view}"
                yield Pair(name, side[thing], path.stem, draw, (name,), words, thing, key)


def _model_name(entry: Mapping[str, str]) -> str:
    """Returns the name without number, so that variants of a model stay together."""
    return " ".join(re.sub(r"\d+", " ", entry["name"]).lower().split())


def clip_art_pairs(classes: Mapping[str, str], cache: Path | None, size: Size) -> Iterator[Pair]:
    """Yields clip art of public domain that resvg draws; `classes` maps a class to its folder."""
    root = fetch("clip-art", cache) / "usr/share/openclipart/svg"
    for name, folder in classes.items():
        paths = sorted((root / folder).glob("*.svg"))
        side = sides(map(series_of, paths), folder)
        random.Random(f"{SEED}/{folder}").shuffle(paths)
        for path in paths[: _CLIP_ART_TRIED if size == "compact" else None]:
            svg = path.read_text(encoding="utf-8", errors="replace")
            draw, series = partial(render.render_svg, svg), series_of(path)
            if "PublicDomain" in svg and shows_something(draw):
                words, key = clip_art_keywords(svg), f"{folder}/{path.name}"
                thing = f"{folder}/{series}"
                yield Pair(name, side[series], "openclipart", draw, (name,), words, thing, key)


def series_of(path: Path) -> str:
    """Returns the file's name without number: what one author drew as a series."""
    return " ".join(re.sub(r"[\d_-]+", " ", path.stem).split())


def shows_something(draw: Callable[[], Image.Image]) -> bool:
    try:
        image = draw()
    except DataError:
        return False
    return len(image.getcolors(image.width * image.height) or ()) > 1


def icon_pairs(
    labels: Mapping[str, tuple[str, ...]], others: frozenset[str], cache: Path | None, size: Size
) -> Iterator[Pair]:
    """Yields icons with every label that one of their keywords stands for.

    Args:
        labels: label -> keywords that stand for it; they occur in no text.
        others: keywords that stand for labels of other tasks; an icon with one is left out.
        cache: folder of the registry packages.
        size: not used; a cap takes fewer.
    """
    known = icon_keywords(cache)
    meant = {word: label for label, words in labels.items() for word in words}
    found = {
        name: tuple(sorted({meant[word] for word in words if word in meant}))
        for name, (_, words) in known.items()
        if not words & others and words & set(meant)
    }
    count = Counter(label for own in found.values() for label in own)
    side = sides((known[name][0] for name in found), "icons")
    for prefix in (prefix for group in ICON_SPLITS.values() for prefix in group):
        icons = iconify_set(cache, prefix)
        drawn: Counter[str] = Counter()
        for key in sorted(icons["icons"]):
            name = icon_base_name(key)
            drawn[name] += 1
            if name not in found or drawn[name] > MAX_PER_SET:
                continue
            thing, keywords = known[name]
            given = sorted(word for word in keywords - set(meant) if ":" not in word)
            yield Pair(
                name=min(found[name], key=lambda label: (count[label], label)),
                split=side[thing],
                family=family_of(prefix),
                draw=partial(draw_icon, icons, key),
                labels=found[name],
                words=(name.replace("-", " "), *given),
                object=thing,
                key=f"{prefix}/{key}",
            )
