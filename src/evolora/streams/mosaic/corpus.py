"""Builds the pretraining corpus of the embedded CLIP: named pictures of families the suite omits.

The corpus holds emoji, icons, flags and scripts by other vendors and in other fonts than
`mosaic/domains` uses for train, val or test, with the same kind of name. Digits, garments, shapes
and furniture do not occur in it at all, so that zero-shot there is transfer. Script snippets use
the letters of the train split only. The corpus is never committed.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from evolora.streams.mosaic import render
from evolora.streams.mosaic.build_domains import Progress
from evolora.streams.mosaic.drawings import (
    EmojiTable,
    draw_icon,
    emoji_table,
    flag_drawings,
    iconify_set,
    squash,
)
from evolora.streams.mosaic.families import (
    EMOJI_PRETRAIN,
    EMOJI_SPLITS,
    FLAG_PRETRAIN,
    FLAG_SPLITS,
    ICON_CATEGORIES_OUT,
    ICON_SETS_OUT,
    ICON_SPLITS,
    PERMISSIVE,
    family_of,
    icon_base_name,
    split_letters,
)
from evolora.streams.mosaic.samples import SEED, open_square
from evolora.streams.mosaic.scripts import font_letters, scripts, snippets
from evolora.streams.mosaic.sources import fetch

GROUPS = ("emoji", "icons", "flags", "scripts")
MIN_FAMILIES = 3  # icon names that fewer hands drew taught nothing in the trials
MAX_PER_SET = 2  # variants of one name in one icon set
MAX_PER_FAMILY = 4
_SNIPPETS_PER_FONT = 160
_OTHER_FONTS = (  # (source, glob below the package root); Noto Serif comes by script
    ("dejavu-core", "**/DejaVuSans.ttf"),
    ("dejavu-core", "**/DejaVuSerif.ttf"),
    ("dejavu-core", "**/DejaVuSansMono-Bold.ttf"),
    ("unifont", "**/unifont.otf"),
    ("unifont", "**/unifont_upper.otf"),
)
_SKIN_TONE = re.compile(r"-(dark|light|medium|medium-dark|medium-light)(-skin-tone)?$")


@dataclass(frozen=True)
class Named:
    """One picture of the corpus."""

    name: str
    group: str
    family: str
    draw: Callable[[], Image.Image]


def _emoji(cache: Path | None, table: EmojiTable) -> Iterator[Named]:
    for prefix in EMOJI_PRETRAIN:
        icons = iconify_set(cache, prefix)
        for key in sorted(icons["icons"]):
            bare = re.sub(r"-\d+$", "", key)  # streamline numbers its variants
            if _SKIN_TONE.search(key):
                continue
            label, group = table.names.get(squash(bare), (bare.replace("-", " "), ""))
            if group != "flags":
                yield Named(label, "emoji", family_of(prefix), partial(draw_icon, icons, key))
    folder = fetch("fluent-emoji-3d", cache) / "package" / "assets"
    for path in sorted(folder.glob("*.webp")):
        label, group = table.codes.get(path.stem.upper(), ("", "flags"))
        if group != "flags":
            yield Named(label, "emoji", "fluent", partial(open_square, path))


def pretraining_icon_sets(cache: Path | None) -> list[str]:
    """Returns the icon sets that may be pretrained on: permissive and of no stream's family."""
    index = json.loads((fetch("iconify", cache) / "package" / "collections.json").read_text())
    streams = [*ICON_SPLITS.values(), *EMOJI_SPLITS.values(), *FLAG_SPLITS.values()]
    taken = {family_of(prefix) for prefixes in streams for prefix in prefixes}
    return [
        prefix
        for prefix, info in sorted(index.items())
        if info["license"].get("spdx") in PERMISSIVE
        and info.get("category") not in ICON_CATEGORIES_OUT
        and prefix not in (*ICON_SETS_OUT, *EMOJI_PRETRAIN, *FLAG_PRETRAIN)
        and family_of(prefix) not in taken
    ]


def _icons(cache: Path | None, table: EmojiTable) -> Iterator[Named]:
    sets = {prefix: iconify_set(cache, prefix) for prefix in pretraining_icon_sets(cache)}
    named: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for prefix, icons in sets.items():
        count: Counter[str] = Counter()
        for key in sorted(icons["icons"]):
            name = icon_base_name(key)
            count[name] += 1
            if count[name] <= MAX_PER_SET and re.search(r"[a-z]{2}", name):
                named[name].append((prefix, key))
    for name, drawings in sorted(named.items()):
        families = {family_of(prefix) for prefix, _ in drawings}
        # an emoji's own label, so that "cat" the icon and "cat" the emoji share a name
        label, _ = table.names.get(squash(name), ("", ""))
        if squash(label) != squash(name):
            label = name.replace("-", " ")
            if len(families) < MIN_FAMILIES:
                continue
        drawn: Counter[str] = Counter()
        for prefix, key in drawings:
            family = family_of(prefix)
            drawn[family] += 1
            if drawn[family] <= MAX_PER_FAMILY:
                yield Named(label, "icons", family, partial(draw_icon, sets[prefix], key))


def _flags(cache: Path | None, table: EmojiTable) -> Iterator[Named]:
    for prefix in FLAG_PRETRAIN:
        icons = iconify_set(cache, prefix)
        for key, country in sorted(flag_drawings(icons, table.countries).items()):
            yield Named(country, "flags", family_of(prefix), partial(draw_icon, icons, key))


def _scripts(cache: Path | None) -> Iterator[Named]:
    noto = fetch("noto-core", cache) / "usr/share/fonts/truetype/noto"
    fonts = [next(fetch(source, cache).glob(pattern)) for source, pattern in _OTHER_FONTS]
    covered = {font: set(font_letters(font)) for font in fonts}
    for script in scripts(cache):
        train = split_letters(script.letters, SEED)["train"]
        serif = noto / script.font.name.replace("Sans", "Serif")
        if serif.is_file() and serif != script.font:
            covered.setdefault(serif, set(font_letters(serif)))
        for font, letters in covered.items():
            own = [letter for letter in train if letter in letters]
            if len(own) < 6:
                continue
            seed = f"pretrain/{script.name}/{font.name}"
            for draw in snippets(font, own, _SNIPPETS_PER_FONT, seed):
                yield Named(script.name, "scripts", font.stem, draw)


def collect(cache: Path | None) -> Iterator[Named]:
    """Yields every picture of the corpus, undrawn."""
    table = emoji_table(cache)
    yield from _emoji(cache, table)
    yield from _icons(cache, table)
    yield from _flags(cache, table)
    yield from _scripts(cache)


def build_pretraining_corpus(
    out: Path, cache: Path | None = None, progress: Progress | None = None
) -> Path:
    """Writes `images.npy`, `labels.npz` and `corpus.json` into `out`; returns the JSON's path.

    `images.npy` is uint8 [n, 64, 64, 3]; `labels.npz` has `name`, `group` and `family` (indices
    into the lists of `corpus.json`).
    """
    items = list(collect(cache))
    if progress:
        progress(f"{len(items)} pictures, {dict(Counter(item.group for item in items))}")
    out.mkdir(parents=True, exist_ok=True)
    side = render.IMAGE_SIZE
    images = np.lib.format.open_memmap(
        out / ".images.npy", mode="w+", dtype=np.uint8, shape=(len(items), side, side, 3)
    )
    for index, item in enumerate(items):
        images[index] = np.asarray(item.draw())
        if progress and index % 10_000 == 0:
            progress(f"drawn {index} of {len(items)}")
    images.flush()
    names = sorted({item.name for item in items})
    families = sorted({item.family for item in items})
    place = {name: index for index, name in enumerate(names)}
    np.savez(
        out / "labels.npz",
        name=np.array([place[item.name] for item in items], dtype=np.int32),
        group=np.array([GROUPS.index(item.group) for item in items], dtype=np.uint8),
        family=np.array([families.index(item.family) for item in items], dtype=np.int16),
    )
    os.replace(out / ".images.npy", out / "images.npy")
    head = {"format_version": 1, "groups": GROUPS, "names": names, "families": families}
    (out / "corpus.json").write_text(json.dumps(head, ensure_ascii=False, indent=1) + "\n")
    return out / "corpus.json"
