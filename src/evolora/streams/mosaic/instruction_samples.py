"""Where the questions of `mosaic/instructions` come from: one function per task, nothing drawn yet.

`name` of a sample is what caps take turns by, here the answer: guessing is no easier than the
number of answers says. `family` is what must not cross splits.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from evolora.streams.mosaic.drawings import draw_icon, emoji_drawings, emoji_table, iconify_set
from evolora.streams.mosaic.families import EMOJI_SPLITS, family_of, split_letters
from evolora.streams.mosaic.furniture import catalogue, mesh_noun, mesh_views
from evolora.streams.mosaic.instruction_words import (
    CLIP_ART,
    COUNTRIES,
    EMOJI_GROUPS,
    FUNCTIONS,
    FURNITURE,
    SCRIPTS,
    SOUGHT,
    WORDINGS,
    emoji_noun,
    with_article,
)
from evolora.streams.mosaic.pairs import series_of, shows_something, sides
from evolora.streams.mosaic.render import render_svg
from evolora.streams.mosaic.samples import (
    BOARD,
    CHAT,
    COLORS,
    SEED,
    SHAPES,
    SKY,
    SPLITS,
    STUDIO,
    Sample,
    Size,
    drawn_on,
    flag_samples,
    icon_samples,
    shape_samples,
)
from evolora.streams.mosaic.scenes import (
    GROUNDS,
    Thing,
    box_of,
    color_name,
    draw_scene,
    places,
    shifted,
)
from evolora.streams.mosaic.scripts import scripts, snippets
from evolora.streams.mosaic.sources import fetch

OPTIONS = "ABCD"
WIDER = 1.2  # a thing is wider than tall, or not, by this factor; in between nobody is asked
_HEIGHTS = (25, 275)  # cm: outside, heights are rare
_PLACED = {"compact": 7, "large": 12}  # ways to place a flag
_SNIPPETS = {"compact": (52, 6, 16), "large": (200, 20, 60)}  # of one script
_VIEWS = {"compact": 2, "large": 8}
_SCENES = {"compact": (480, 60, 160), "large": (4000, 400, 1200)}


@dataclass(frozen=True)
class Question(Sample):
    """One picture and what is asked about it."""

    picture: str  # names the picture; several questions may be about one
    text: str
    answers: tuple[str, ...]  # the first is learned; all count as right


def _ask(
    sample: Sample, picture: str, kind: str, answers: tuple[str, ...], about: str = ""
) -> Question:
    """Returns a question of a kind in one of its wordings, chosen by what it is about."""
    rng = random.Random(f"{SEED}/{kind}/{picture}/{about}")
    text = rng.choice(WORDINGS[kind]).replace("{}", about)
    return Question(
        name=sample.name,
        split=sample.split,
        family=sample.family,
        draw=sample.draw,
        picture=picture,
        text=text,
        answers=answers,
    )


def shape_questions(cache: Path | None, size: Size) -> Iterator[Question]:
    """Yields three questions about each picture of easy-VQA: color, shape, is it."""
    for number, sample in enumerate(shape_samples(cache, size)):
        color, _, shape = sample.name.partition(" ")
        picture = f"easy-vqa/{sample.split}/{number}"
        for kind, answer in (("color", color), ("shape", shape)):
            own = Sample(f"{kind}/{answer}", sample.split, picture, sample.draw)
            yield _ask(own, picture, kind, (answer,))
        rng = random.Random(f"{SEED}/{picture}")
        known, right = rng.choice(((COLORS, color), (SHAPES, shape)))
        yes = rng.random() < 0.5
        said = right if yes else rng.choice([one for one in known if one != right])
        answer = "yes" if yes else "no"
        own = Sample(f"is it/{answer}", sample.split, picture, sample.draw)
        about = said if known is COLORS else with_article(said)
        yield _ask(own, picture, "is-it", (answer,), about)


def emoji_questions(cache: Path | None, size: Size) -> Iterator[Question]:
    for split, family, thing in _things(cache):
        draw = partial(draw_icon, thing.icons, thing.key, CHAT)
        own = Sample(thing.noun, split, family, draw)
        yield _ask(own, f"{family}/{thing.key}", "emoji", (with_article(thing.noun),))


def _things(cache: Path | None) -> Iterator[tuple[str, str, Thing]]:
    """Yields split, vendor family and drawing of every emoji that shows a noun of the table."""
    table = emoji_table(cache)
    for split, prefixes in EMOJI_SPLITS.items():
        for prefix in prefixes:
            icons = iconify_set(cache, prefix)
            for key, label in sorted(emoji_drawings(icons, table, EMOJI_GROUPS).items()):
                noun = emoji_noun(label)
                if noun:
                    yield split, family_of(prefix), Thing(noun, icons, key)


def flag_questions(cache: Path | None, size: Size) -> Iterator[Question]:
    """Yields each flag in several places and sizes: a set has one drawing of it or two."""
    for number, sample in enumerate(flag_samples(cache, size)):
        if sample.name not in COUNTRIES:
            continue
        for place in range(_PLACED[size]):
            picture = f"{sample.family}/{number}/{place}"
            draw = partial(shifted, sample.draw, SKY, picture)
            own = Sample(sample.name, sample.split, sample.family, draw)
            yield _ask(own, picture, "flag", (sample.name,))


def script_questions(cache: Path | None, size: Size) -> Iterator[Question]:
    """Yields multiple choices among four scripts in alphabetical order."""
    for script in scripts(cache):
        if script.name not in SCRIPTS:
            continue
        letters = split_letters(script.letters, SEED)
        for split, count in zip(SPLITS, _SNIPPETS[size], strict=True):
            family = f"{script.name}/{split} letters"
            drawn = snippets(script.font, letters[split], count, f"instructions/{family}")
            for number, draw in enumerate(drawn):
                picture = f"{family}/{number}"
                letter, listed = _options(script.name, random.Random(f"{SEED}/{picture}"))
                own = Sample(script.name, split, family, partial(drawn_on, BOARD, draw))
                yield _ask(own, picture, "script", (letter, script.name), listed)


def _options(right: str, rng: random.Random) -> tuple[str, str]:
    """Returns the letter of the right script and the lines of all options."""
    others = [name for name in SCRIPTS if name != right]
    options = sorted([right, *rng.sample(others, len(OPTIONS) - 1)])
    lines = (f"{letter}. {name}" for letter, name in zip(OPTIONS, options, strict=True))
    return OPTIONS[options.index(right)], "\n".join(lines)


def icon_questions(cache: Path | None, size: Size) -> Iterator[Question]:
    for number, sample in enumerate(icon_samples(cache, size)):
        words = FUNCTIONS.get(sample.name)
        if words:
            picture = f"{sample.family}/{number}"
            yield _ask(sample, picture, "icon", (", ".join(words),))


def furniture_questions(cache: Path | None, size: Size) -> Iterator[Question]:
    """Yields questions about views of a model: what it is, is it wider than tall, how tall."""
    root = fetch("furniture", cache) / "usr/share/sweethome3d/furniture"
    objects: dict[str, list[tuple[Path, dict[str, str]]]] = defaultdict(list)
    for path in sorted(root.glob("*.sh3f")):
        for entry in catalogue(path):
            noun = FURNITURE.get(mesh_noun(entry["name"]) or "")
            if noun:
                objects[noun].append((path, entry))
    for noun, members in sorted(objects.items()):
        # one file may be listed by two names; its views stay together
        side = sides((model_of(path, entry) for path, entry in members), f"instructions/{noun}")
        for path, entry in members:
            model = model_of(path, entry)
            facts = furniture_facts(noun, float(entry["width"]), float(entry["height"]))
            views = mesh_views(path, entry["model"].lstrip("/"), _VIEWS[size], STUDIO)
            for view, draw in enumerate(views):
                for kind, answer in facts.items():
                    own = Sample(f"{kind}/{answer}", side[model], model, draw)
                    yield _ask(own, f"{model}/{view}", kind, (answer,))


def model_of(path: Path, entry: Mapping[str, str]) -> str:
    """Returns what names a catalogue's model."""
    return f"{path.stem}/{entry['model'].lstrip('/')}"


def furniture_facts(noun: str, width: float, height: float) -> dict[str, str]:
    """Returns kind of question -> answer, of the kinds that a model with these cm answers well."""
    facts = {"furniture": noun}
    if width >= WIDER * height or height >= WIDER * width:
        facts["wider"] = "yes" if width > height else "no"
    if _HEIGHTS[0] <= height <= _HEIGHTS[1]:
        facts["height"] = str(max(50, 50 * round(height / 50)))
    return facts


def clip_art_questions(cache: Path | None, size: Size) -> Iterator[Question]:
    """Yields clip art of public domain with a caption: its color, measured, and its folder."""
    root = fetch("clip-art", cache) / "usr/share/openclipart/svg"
    for noun, folders in CLIP_ART.items():
        paths = [path for folder in folders for path in sorted((root / folder).glob("*.svg"))]
        side = sides(map(series_of, paths), f"instructions/{noun}")
        for path in paths:
            svg = path.read_text(encoding="utf-8", errors="replace")
            draw, series = partial(render_svg, svg), series_of(path)
            if "PublicDomain" in svg and shows_something(draw):
                caption = f"A drawing of {with_article(f'{color_name(draw())} {noun}')}."
                own = Sample(noun, side[series], f"{noun}/{series}", draw)
                picture = str(path.relative_to(root))
                yield _ask(own, picture, "clip-art", (caption,))


def scene_questions(cache: Path | None, size: Size) -> Iterator[Question]:
    """Yields scenes of two different things by one vendor, and asks where one of them is."""
    vendors: dict[tuple[str, str], dict[str, list[Thing]]] = defaultdict(lambda: defaultdict(list))
    for split, family, thing in _things(cache):
        if thing.noun in SOUGHT:
            vendors[split, family][thing.noun].append(thing)
    for split, count in zip(SPLITS, _SCENES[size], strict=True):
        families = sorted(family for side, family in vendors if side == split)
        for number in range(count):
            picture = f"scene/{split}/{number}"
            rng = random.Random(f"{SEED}/{picture}")
            family = families[number % len(families)]
            known = vendors[split, family]
            nouns = rng.sample(sorted(known), 2)
            things = [rng.choice(known[noun]) for noun in nouns]
            spots = places(rng)
            standing = tuple(zip(things, spots, strict=True))
            draw = partial(draw_scene, standing, rng.choice(GROUNDS))
            own = Sample(nouns[0], split, family, draw)
            yield _ask(own, picture, "scene", (box_of(spots[0]),), nouns[0])
