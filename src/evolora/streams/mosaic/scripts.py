"""Finds the writing systems that the Noto fonts cover, and sets snippets of random letters."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image, ImageFont

from evolora.errors import DataError
from evolora.streams.mosaic import render
from evolora.streams.mosaic.sources import fetch

MIN_LETTERS = 20  # fewer would leave a split without enough letters for a snippet
_FONT_SIZE = 40  # pixels; the snippet is scaled to the square afterwards
# fonts that hold symbols, a style of another script, or digits only
_NO_SCRIPT = re.compile(
    r"(Symbols|Math|Display|Unjoined|Siyaq|Tifinagh\w+|Supplement|Slanted|SignWriting|Music|Mono"
    r"|Numerals|Duployan|Looped)"
)
_GENERAL = ("LATIN", "GREEK", "CYRILLIC")  # scripts that NotoSans-Regular itself covers
_TITLES = {"CanadianAboriginal": "Canadian Aboriginal syllabics", "NKo": "N'Ko"}


@dataclass(frozen=True)
class Script:
    """One writing system: its name for prompts, its font, the letters that the font draws."""

    name: str
    font: Path
    letters: tuple[str, ...]


def font_letters(path: Path) -> list[str]:
    """Returns the letters (no marks, digits or presentation forms) that a font file draws."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise DataError("reading fonts needs the package 'fonttools' (pip install it)") from error
    with TTFont(path, lazy=True) as font:
        points = sorted(font.getBestCmap())
    letters = [chr(point) for point in points if unicodedata.category(chr(point))[0] == "L"]
    return [c for c in letters if unicodedata.name(c, "") and unicodedata.category(c) != "Lm"]


def script_word(letter: str) -> str:
    """Returns the first word of the letter's Unicode name, which is its script's."""
    return unicodedata.name(letter).split()[0]


def scripts(cache: Path | None) -> list[Script]:
    """Returns every script that one regular Noto font covers with enough letters, by name."""
    folder = fetch("noto-core", cache) / "usr/share/fonts/truetype/noto"
    found: dict[str, Script] = {}
    for path in [*sorted(folder.glob("NotoSans*-Regular.ttf")), *_serif_only(folder)]:
        stem = re.sub(r"^Noto(Sans|Serif)|-Regular$", "", path.stem)
        if _NO_SCRIPT.search(stem):
            continue
        letters = font_letters(path)
        words = Counter(map(script_word, letters))
        chosen = _GENERAL if not stem else tuple(w for w, _ in words.most_common(1))
        for word in chosen:
            own = tuple(c for c in letters if script_word(c) == word)
            name = word.capitalize() if not stem else _title(stem)
            if len(own) >= MIN_LETTERS and name not in found:
                found[name] = Script(name, path, own)
    return [found[name] for name in sorted(found)]


def _serif_only(folder: Path) -> list[Path]:
    """Returns serif fonts of scripts that have no sans font."""
    serif = sorted(folder.glob("NotoSerif*-Regular.ttf"))
    return [p for p in serif if not (folder / p.name.replace("Serif", "Sans")).is_file()]


def _title(stem: str) -> str:
    """Returns "Old Turkic" for "OldTurkic"."""
    return _TITLES.get(stem) or re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem)


@lru_cache(maxsize=8)
def _font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def snippets(
    font: Path, letters: Sequence[str], count: int, seed: str
) -> Iterator[Callable[[], Image.Image]]:
    """Yields drawers of `count` snippets: 6 to 9 random letters in two or three lines."""
    rng = random.Random(seed)
    for _ in range(count):
        text = rng.choices(letters, k=rng.randint(6, 9))
        rows = rng.choice((2, 3))
        width = -(-len(text) // rows)
        lines = ["".join(text[i : i + width]) for i in range(0, len(text), width)]
        yield partial(_draw, font, tuple(lines))


def _draw(font: Path, lines: tuple[str, ...]) -> Image.Image:
    return render.render_snippet(_font(font), lines)
