"""Plans `mosaic/modalities`: which object is shown how, and what is asked about it.

Names, colors, motions and all else that is drawn by lot come in turns, each as often as the others,
so that what is said most often tells as little as possible.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from evolora.streams.mosaic.instruction_words import with_article
from evolora.streams.mosaic.modality_sources import (
    Recording,
    Source,
    Thing,
    animations,
    objects,
    recordings,
)
from evolora.streams.mosaic.modality_words import (
    ANSWERS,
    COLORS,
    COUNTS,
    DISTANCES,
    KINDS,
    MODALITIES,
    MOTIONS,
    POSES,
    STEPS,
    WORDINGS,
    audio_captions,
    depth_captions,
    image_captions,
    pc_captions,
    video_captions,
)
from evolora.streams.mosaic.samples import SEED, SPLITS, Size

EMOJI_SHARE = 4  # every fourth film is an animated emoji
_ROUND = ("bottle", "cup", "lamp", "plant")  # things that look the same from all sides
_LEAST_STEP = 4  # semitones between two notes that rise or fall
_NAMING = ("what", "sound", "emoji")  # kinds whose answer can be asked for by yes or no
_RARE = {"is-it": 2}  # kinds asked so many times less often

# items of a modality in train, val, test
Numbers = Mapping[str, tuple[int, int, int]]
COMPACT: Numbers = {
    "image": (230, 30, 80),
    "video": (200, 24, 72),
    "audio": (220, 28, 76),
    "depth": (230, 30, 80),
    "pc": (220, 28, 76),
}
ASKED: Mapping[str, int | None] = {"train": None, "val": 2, "test": 3}
"""Split -> questions about an item, at most; None is all that it can answer."""
LARGE: Numbers = {name: (6 * a, 6 * b, 6 * c) for name, (a, b, c) in COMPACT.items()}

T = TypeVar("T")
S = TypeVar("S", bound=Source)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture, film, recording, depth map or cloud to be made.

    Args:
        modality: one of `MODALITIES`.
        split: one of `samples.SPLITS`.
        sources: what it is made of: one object or animation, or one to three recordings.
        ways: how it is shown: a color, a motion, a distance, a pose.
        answers: kind of question -> accepted answers.
        seed: of what is left to chance.
    """

    modality: str
    split: str
    sources: tuple[Source, ...]
    ways: Mapping[str, str]
    answers: Mapping[str, tuple[str, ...]]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about an item."""

    kind: str
    text: str
    answers: tuple[str, ...]


def plan(
    cache: Path | None, size: Size, numbers: Numbers | None = None
) -> Iterator[tuple[Item, list[Question]]]:
    """Yields the items and the questions about each, modality by modality, split by split.

    Args:
        cache: folder of the registry packages.
        size: "compact" asks some questions about an item (`ASKED`), "large" all that it can answer.
        numbers: items per modality and split; `COMPACT` or `LARGE` by default.
    """
    pools: tuple[Sequence[Source], ...] = (objects(cache), animations(cache), recordings(cache))
    counts = numbers or (COMPACT if size == "compact" else LARGE)
    for modality in MODALITIES:
        for split, count in zip(SPLITS, counts[modality], strict=True):
            lots = random.Random(f"{SEED}/modalities/{modality}/{split}")
            parts = [[one for one in pool if one.side == split] for pool in pools]
            own = random.Random(f"{SEED}/modalities/{modality}/{split}/questions")
            asker = _Asker(modality, own, ASKED[split] if size == "compact" else None)
            for item in _ITEMS[modality](modality, split, parts, count, lots):
                yield item, asker.ask(item)


def in_turns(values: Sequence[T], lots: random.Random) -> Iterator[T]:
    """Yields the values for ever, each as often as the others, in a new order every round."""
    while values:
        order = list(values)
        lots.shuffle(order)
        yield from order


def by_name(sources: Sequence[S], lots: random.Random) -> Iterator[S]:
    """Yields sources for ever, taking turns among names, then among the sources of a name."""
    named: dict[str, list[S]] = defaultdict(list)
    for source in sources:
        named[source.name].append(source)
    turns = {name: in_turns(members, lots) for name, members in named.items()}
    for name in in_turns(sorted(named), lots):
        yield next(turns[name])


Parts = Sequence[Sequence[Source]]
"""Objects, animations and recordings of one side."""


def _things(parts: Parts, count: int, lots: random.Random) -> Iterator[tuple[int, Thing, str]]:
    """Yields a number, an object and a color, `count` times."""
    things = [one for one in parts[0] if isinstance(one, Thing)]
    turns = zip(by_name(things, lots), in_turns(tuple(COLORS), lots), strict=False)
    for index, (thing, color) in zip(range(count), turns, strict=False):
        yield index, thing, color


def _item(
    modality: str,
    split: str,
    lots: random.Random,
    sources: tuple[Source, ...],
    ways: Mapping[str, str],
    answers: Mapping[str, Sequence[str] | None],
) -> Item:
    return Item(
        modality=modality,
        split=split,
        sources=sources,
        ways=ways,
        answers={
            kind: (one,) if isinstance(one, str) else tuple(one)
            for kind, one in answers.items()
            if one
        },
        seed=lots.getrandbits(32),
    )


def _pictures(
    modality: str, split: str, parts: Parts, count: int, lots: random.Random
) -> Iterator[Item]:
    for _, thing, color in _things(parts, count, lots):
        answers = {
            "what": thing.name,
            "color": color,
            "shape": thing.shape,
            "caption": image_captions(thing.name, color, thing.shape),
        }
        yield _item(modality, split, lots, (thing,), {"color": color}, answers)


def _films(
    modality: str, split: str, parts: Parts, count: int, lots: random.Random
) -> Iterator[Item]:
    emoji = by_name(parts[1], lots)
    turning = in_turns(tuple(MOTIONS), lots)
    passing = in_turns(tuple(MOTIONS)[2:], lots)
    for index, thing, color in _things(parts, count, lots):
        moving = next(emoji, None) if index % EMOJI_SHARE == 0 else None
        if moving is not None:
            yield _item(modality, split, lots, (moving,), {}, {"emoji": moving.name})
            continue
        motion = next(passing if thing.name in _ROUND else turning)
        answers = {
            "what": thing.name,
            "color": color,
            "motion": motion,
            "caption": video_captions(thing.name, color, motion),
        }
        yield _item(modality, split, lots, (thing,), {"color": color, "motion": motion}, answers)


def _depths(
    modality: str, split: str, parts: Parts, count: int, lots: random.Random
) -> Iterator[Item]:
    distances = in_turns(tuple(DISTANCES), lots)
    for _, thing, _ in _things(parts, count, lots):
        distance = next(distances)
        answers = {
            "what": thing.name,
            "shape": thing.shape,
            "distance": distance,
            "caption": depth_captions(thing.name, distance, thing.shape),
        }
        yield _item(modality, split, lots, (thing,), {"distance": distance}, answers)


def _clouds(
    modality: str, split: str, parts: Parts, count: int, lots: random.Random
) -> Iterator[Item]:
    poses = in_turns(tuple(POSES), lots)
    for _, thing, color in _things(parts, count, lots):
        pose = next(poses)
        answers = {
            "what": thing.name,
            "color": color,
            "shape": thing.shape if pose == "upright" else None,
            "pose": pose,
            "caption": pc_captions(thing.name, color, pose),
        }
        yield _item(modality, split, lots, (thing,), {"color": color, "pose": pose}, answers)


def _clips(
    modality: str, split: str, parts: Parts, count: int, lots: random.Random
) -> Iterator[Item]:
    pool = [one for one in parts[2] if isinstance(one, Recording)]
    steps, numbers = in_turns(STEPS, lots), in_turns(COUNTS, lots)
    for _, first in zip(range(count), by_name(pool, lots), strict=False):
        number, step = next(numbers), None
        strokes: tuple[Recording, ...] = (first,) * (COUNTS.index(number) + 1)
        if number == "two" and first.note is not None:
            strokes, step = _two_notes(first, pool, next(steps), lots)
        pitches = {one.pitch for one in strokes}
        pitch = first.pitch if len(pitches) == 1 else None
        answers = {
            "sound": first.name,
            "pitch": pitch,
            "count": number,
            "step": step,
            "caption": audio_captions(first.name, number, pitch),
        }
        yield _item(modality, split, lots, strokes, {}, answers)


def _two_notes(
    first: Recording, pool: Sequence[Recording], step: str, lots: random.Random
) -> tuple[tuple[Recording, ...], str]:
    """Returns two notes of one instrument and how the tone goes on; it stays if it must."""
    notes = [one for one in pool if one.name == first.name and one.note and first.note]
    far = [one for one in notes if abs((one.note or 0) - (first.note or 0)) >= _LEAST_STEP]
    if step == "stays" or not far:
        return (first, first), "stays"
    low, high = sorted((first, lots.choice(far)), key=lambda one: one.note or 0)
    return ((low, high) if step == "rises" else (high, low)), step


_Collect = Callable[[str, str, Parts, int, random.Random], Iterator[Item]]
_ITEMS: Mapping[str, _Collect] = {
    "image": _pictures,
    "video": _films,
    "audio": _clips,
    "depth": _depths,
    "pc": _clouds,
}


class _Asker:
    """Asks about the items of one modality and split, every kind and every answer in turns."""

    def __init__(self, modality: str, lots: random.Random, most: int | None) -> None:
        self.kinds = KINDS[modality]
        self.lots = lots
        self.most = most
        self.asked: Counter[str] = Counter()
        self.answered: dict[str, Counter[str]] = defaultdict(Counter)
        self.wordings = {kind: in_turns(WORDINGS[kind], lots) for kind in self.kinds}
        self.others: dict[str, Iterator[str]] = {
            kind: in_turns(ANSWERS[kind], lots) for kind in _NAMING
        }

    def ask(self, item: Item) -> list[Question]:
        """Returns questions that the item answers: those asked least so far."""
        able = [kind for kind in self.kinds if self._fits(kind, item)]
        able.sort(key=lambda kind: (self.asked[kind] * _RARE.get(kind, 1), self.lots.random()))
        return [self._question(kind, item) for kind in able[: self.most]]

    def _fits(self, kind: str, item: Item) -> bool:
        if kind == "is-it":
            return True
        if kind not in item.answers:
            return False
        if kind in _NAMING or kind == "caption":
            return True
        counts = self.answered[kind]
        return counts[item.answers[kind][0]] <= min(counts[one] for one in ANSWERS[kind]) + 1

    def _question(self, kind: str, item: Item) -> Question:
        self.asked[kind] += 1
        wording = next(self.wordings[kind])
        if kind != "is-it":
            self.answered[kind][item.answers[kind][0]] += 1
            return Question(kind=kind, text=wording, answers=item.answers[kind])
        naming = next(one for one in _NAMING if one in item.answers)
        name = item.answers[naming][0]
        answer = min(("yes", "no"), key=lambda one: self.answered[kind][one])
        self.answered[kind][answer] += 1
        if answer == "no":
            name = next(one for one in self.others[naming] if one != name)
        return Question(kind=kind, text=wording.format(with_article(name)), answers=(answer,))
